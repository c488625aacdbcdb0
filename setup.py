"""Packaging. The ranges in CORE are what the code is known to need; the extras `cpu` and `gpu` are the exact pins of requirements/,
so that an installed package knows them too (`eureka doctor` compares with them)."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
CORE = [
    "torch>=2.11",
    "numpy>=1.26",
    "pillow>=10",
    "safetensors>=0.5",
    "transformers>=5.16",
    "tokenizers>=0.22",
    "pydantic>=2.8",
    "omegaconf>=2.3",
    "rich>=13",
    "math-verify==0.9.0",
    "datasets>=4",
    "pyarrow>=17",
    "matplotlib>=3.8",
    "tensorboard>=2.17",
    "plotly>=6",
    "jinja2>=3.1",
    "wandb>=0.18",
    "httpx>=0.27",
    "psutil>=5.9",
    "pyyaml>=6",
]


def pins(name: str) -> list[str]:
    """The lines of requirements/NAME.txt without its comments."""
    lines = (HERE / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


setup(
    name="eureka-megatron",
    version="0.1.0",
    description="MM-EUREKA on Megatron-Core: rule-based reinforcement learning for Qwen2.5-VL, from two CPU cores to many GPUs",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["eureka_megatron", "eureka_megatron.*"]),
    package_data={"eureka_megatron": ["**/*.yaml", "**/*.j2", "planning/configs/*/config.json", "report/static/*"]},
    install_requires=CORE,
    extras_require={
        "cpu": pins("cpu"),  # Python 3.11
        "gpu": pins("gpu"),  # Python 3.12; sync/ is written for the trainer API of vLLM 0.32, and 0.33 has another
        "quantize": ["nvidia-modelopt>=0.42.0"],
        "video": ["opencv-python-headless>=4.8"],  # for video files; vLLM brings it along
        "dev": ["pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.9", "mypy>=2"],
    },
    entry_points={"console_scripts": ["eureka = eureka_megatron.cli:main"]},
)
