"""Scripts over model folders and weights; `deepseek-convert` is their command line."""
