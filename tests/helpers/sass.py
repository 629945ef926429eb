"""What CUDA's assembler makes of a kernel: registers, spills and the instructions of its loop.

Needs nvidia-cuda-nvcc and nvidia-cuda-nvdisasm; no driver.
"""

import dataclasses
import importlib.util
import re
import subprocess
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Assembled:
    """A kernel as machine code of a GPU.

    Attributes:
      registers: registers per thread.
      spilled: bytes per thread that are stored to or loaded from memory for want of registers.
      warps: warps per block of threads.
      loop: instructions of its longest loop, which each warp executes per iteration.
    """

    registers: int
    spilled: int
    warps: int
    loop: int


def assembled(program_dump: Path, kernel: str, architecture: str = "sm_90a") -> Assembled:
    """Assembles a kernel of a compiled program.

    Args:
      program_dump: folder that the program was compiled with as xla_dump_to.
      kernel: name of the kernel.
      architecture: the GPU's; an H100's by default.
    """
    entry = f".entry {kernel}("
    (ptx,) = (path for path in program_dump.glob("*.ptx") if entry in path.read_text())
    cubin = ptx.with_suffix(".cubin")
    report = _run("ptxas", "-v", f"-arch={architecture}", f"--output-file={cubin}", str(ptx))
    threads = int(re.search(r"\.(?:req|max)ntid (\d+)", ptx.read_text())[1])
    return Assembled(
        registers=int(re.search(r"Used (\d+) registers", report)[1]),
        spilled=sum(map(int, re.findall(r"(\d+) bytes spill", report))),
        warps=threads // 32,
        loop=_longest_loop(_run("nvdisasm", "-c", str(cubin))),
    )


def _longest_loop(code: str) -> int:
    """Counts the instructions from the target of a branch back to the branch."""
    labels, count, longest = {}, 0, 0
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/", line):
            count += 1
            if branch := re.search(r"\bBRA `\((\.L_x_\d+)\)", line):
                longest = max(longest, count - labels.get(branch[1], count))
    return longest


def _run(program: str, *arguments: str) -> str:
    (cuda,) = importlib.util.find_spec("nvidia.cu13").submodule_search_locations
    command = [f"{cuda}/bin/{program}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
