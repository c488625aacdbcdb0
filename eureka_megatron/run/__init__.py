"""What a run consists of: Ray, data, trainer ranks, engines, judges; where it goes on; supervised training."""
