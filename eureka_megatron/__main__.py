"""`python -m eureka_megatron` is `eureka`."""

from eureka_megatron.cli.commands import main

if __name__ == "__main__":
    raise SystemExit(main())
