"""LI-DiT: what is computed. Imports neither ray, deepspeed nor mlflow."""
