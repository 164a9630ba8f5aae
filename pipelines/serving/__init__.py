"""The online platform: an HTTP application on Ray Serve around the engine of `lidit.serving`."""
