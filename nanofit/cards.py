"""GPUs by name: what a plan needs to know about a card that isn't here, and the peak for MFU."""

import difflib
import re
from dataclasses import dataclass, replace

from nanofit.errors import UsageError
from nanofit.units import CONTEXT_BYTES, GIB, gib

# Name, GiB as nvidia-smi lists them, SMs, compute capability, TFLOP/s: dense bfloat16/float16 matrix products with
# float32 accumulation, from NVIDIA's data sheets and architecture white papers (the larger figures quoted there are for
# sparse matrices, or for float16 accumulation on GeForce cards). A name comes before any shorter one that it contains.
TABLE = (
    ("GB200", 185, 148, 10.0, 2500), ("B200", 179, 148, 10.0, 2250), ("GH200", 95.6, 132, 9.0, 989),
    ("H200", 140.4, 132, 9.0, 989), ("H100 PCIe", 79.6, 114, 9.0, 756), ("H100 NVL", 93.6, 132, 9.0, 835),
    ("H100", 79.6, 132, 9.0, 989), ("H800", 79.6, 132, 9.0, 989), ("A100", 40, 108, 8.0, 312),
    ("A800", 80, 108, 8.0, 312), ("A30", 24, 56, 8.0, 165), ("A40", 45, 84, 8.6, 149.7), ("A10G", 22.5, 80, 8.6, 70),
    ("A10", 22.5, 72, 8.6, 125), ("A2", 15, 10, 8.6, 18), ("L40S", 45, 142, 8.9, 362), ("L40", 45, 142, 8.9, 181),
    ("L4", 22.5, 58, 8.9, 121), ("T4", 15, 40, 7.5, 65), ("V100-PCIE", 16, 80, 7.0, 112), ("V100", 16, 80, 7.0, 125),
    ("TITAN V", 12, 80, 7.0, 110), ("TITAN RTX", 24, 72, 7.5, 130.5), ("RTX 6000 Ada", 48, 142, 8.9, 364.2),
    ("RTX A6000", 48, 84, 8.6, 154.8), ("RTX A5000", 24, 64, 8.6, 111.1), ("RTX A4000", 16, 48, 8.6, 76.7),
    ("RTX 5090", 32, 170, 12.0, 209.5), ("RTX 5080", 16, 84, 12.0, 112.6), ("RTX 5070 Ti", 16, 70, 12.0, 87.9),
    ("RTX 5070", 12, 48, 12.0, 61.7), ("RTX 4090", 24, 128, 8.9, 165.2), ("RTX 4080 SUPER", 16, 80, 8.9, 104.4),
    ("RTX 4080", 16, 76, 8.9, 97.5), ("RTX 4070 Ti SUPER", 16, 66, 8.9, 88.2), ("RTX 4070 Ti", 12, 60, 8.9, 80.2),
    ("RTX 4070 SUPER", 12, 56, 8.9, 71), ("RTX 4070", 12, 46, 8.9, 58.3), ("RTX 4060 Ti", 8, 34, 8.9, 44.1),
    ("RTX 4060", 8, 24, 8.9, 30.2), ("RTX 3090 Ti", 24, 84, 8.6, 80), ("RTX 3090", 24, 82, 8.6, 71),
    ("RTX 3080 Ti", 12, 80, 8.6, 68.2), ("RTX 3080", 10, 68, 8.6, 59.5), ("RTX 3070 Ti", 8, 48, 8.6, 43.5),
    ("RTX 3070", 8, 46, 8.6, 40.6), ("RTX 3060 Ti", 8, 38, 8.6, 32.4), ("RTX 3060", 12, 28, 8.6, 25.6),
    ("RTX 2080 Ti", 11, 68, 7.5, 53.8), ("RTX 2080 SUPER", 8, 48, 7.5, 44.6), ("RTX 2080", 8, 46, 7.5, 40.3),
    ("RTX 2070", 8, 36, 7.5, 29.9), ("RTX 2060", 6, 30, 7.5, 25.8),
)  # fmt: skip


@dataclass(frozen=True)
class Card:
    """A GPU. If only its memory is known, the rest is 0, and the capability is that of common cards."""

    name: str
    memory_gb: float  # GiB
    sm_count: int = 0  # streaming multiprocessors
    capability: tuple = (8, 0)
    tflops: float = 0.0

    def __str__(self):
        if not self.name:
            return f"a card ({self.memory_gb:g} GiB)"
        capability = "{}.{}".format(*self.capability)
        return f"{self.name} ({self.memory_gb:g} GiB, {self.sm_count} SMs, compute capability {capability})"


CARDS = tuple(
    Card(name, memory_gb, sms, (int(capability), round(10 * capability) % 10), tflops)
    for name, memory_gb, sms, capability, tflops in TABLE
)
A100 = next(card for card in CARDS if card.name == "A100")
MEMORY = re.compile(r"(\d+(?:\.\d+)?) *gi?b\b")
VENDORS_WORDS = re.compile(r"nvidia|geforce|tesla|quadro|rtx|generation|gpu|sxm\d?|hbm\d?e?")


def best_dtype(capability):
    """'bfloat16' if the hardware computes in it, else 'float16': older GPUs emulate bfloat16, slowly."""
    return "bfloat16" if capability >= (8, 0) else "float16"


def of_driver(name):
    """The Card for the name that a driver gives, or None."""
    return next((card for card in CARDS if re.search(rf"\b{re.escape(card.name)}\b", name, re.IGNORECASE)), None)


def named(gpu):
    """The Card that the key gpu names: 'RTX 3060', 'nvidia a100-sxm4-80gb', or by its memory alone '12GB'.

    A memory in the name replaces the table's. UsageError for an unknown card, with similar names.
    """
    memory, word = MEMORY.search(gpu.lower()), _word(gpu)
    known = {_word(card.name): card for card in CARDS}
    card = known.get(word) or known.get(word.replace("pcie", "")) or (Card("", 0.0) if memory and not word else None)
    if not card:
        near = [known[word].name for word in difflib.get_close_matches(word, known)]
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise UsageError(f"gpu={gpu!r} is not known{hint}; for any other card, give its memory: --gpu=12GB")
    card = replace(card, memory_gb=float(memory[1]) if memory else card.memory_gb)
    if card.memory_gb * GIB <= CONTEXT_BYTES:
        raise UsageError(f"gpu={gpu!r}: CUDA itself takes {gib(CONTEXT_BYTES)} of a card's memory: give more")
    return card


def _word(name):
    """A card's name without words that many cards share, such as NVIDIA and RTX."""
    return re.sub(r"[^a-z0-9]", "", VENDORS_WORDS.sub("", MEMORY.sub("", name.lower())))
