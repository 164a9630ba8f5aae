"""Training on Ray Train and DeepSpeed: the driver, the loop, the engine, exact resume."""
