"""How the work is spread over a cluster: the only place that imports ray, deepspeed and mlflow."""
