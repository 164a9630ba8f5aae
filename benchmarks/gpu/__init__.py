"""What one GPU does with this project in eight minutes: `python -m benchmarks.gpu`, see
benchmarks/gpu.md.
"""
