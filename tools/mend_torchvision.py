"""Make `import torchvision` work beside a CPU build of torch.

The torchvision wheel that package indexes ship is compiled against CUDA. On a CPU torch its extension does not load, and
importing torchvision dies with `operator torchvision::nms does not exist`. transformers and vLLM need only its pure-Python
transforms, so declaring the two missing operator schemas just before the import is enough. It must happen in every process
(vLLM starts some of its own), hence a `.pth` file, which the interpreter reads at start-up. This belongs to the
environment, not to the package: a machine with a matching torchvision does not need it, and this script then does nothing.

Usage: python tools/mend_torchvision.py   (with the interpreter of the environment to mend)
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

HOOK = '''"""Declares two torchvision operators before torchvision is imported (written by tools/mend_torchvision.py)."""
import importlib.abc
import sys


class _DeclareOperators(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            for operator in ("nms", "qnms"):
                torch.library.define(
                    f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
        return None


sys.meta_path.insert(0, _DeclareOperators())
'''


def imports_cleanly() -> bool:
    return subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode == 0


def main() -> int:
    if imports_cleanly():
        print("torchvision imports cleanly: nothing to mend")
        return 0
    site_packages = Path(sysconfig.get_paths()["purelib"])
    (site_packages / "_torchvision_operators.py").write_text(HOOK)
    (site_packages / "torchvision_operators.pth").write_text("import _torchvision_operators\n")
    if not imports_cleanly():
        print("error: torchvision still does not import; reinstall it to match torch", file=sys.stderr)
        return 1
    print(f"torchvision mended in {site_packages.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
