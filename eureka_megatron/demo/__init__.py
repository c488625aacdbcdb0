"""`eureka demo` and what it makes up: a counting task, tiny Qwen2.5-VL checkpoints of every published form."""
