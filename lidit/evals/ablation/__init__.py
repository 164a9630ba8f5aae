"""An ablation's arms: results, the paper's own numbers, the report that compares them."""
