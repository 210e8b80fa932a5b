"""What users read when something goes wrong, and which errors say that memory ran out."""

import pytest
import torch

from nanofit.errors import UsageError, is_lost_rank, is_out_of_memory, lost_sentence, memory_sentence


def torchs_own_on_a_cpu():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    return caught.value


CUDA = (
    "CUDA out of memory. Tried to allocate 6.14 GiB. GPU 0 has a total capacity of 11.69 GiB of which 1.20 GiB is "
    "free. If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF\nSee documentation"
)
MPS = "MPS backend out of memory (MPS allocated: 17.93 GiB, max allowed: 18.13 GiB). Tried to allocate 500.00 MiB"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (torch.OutOfMemoryError(CUDA), "memory ran out on asking for 6.14 GiB"),
        (RuntimeError(CUDA), "memory ran out on asking for 6.14 GiB"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), "memory ran out"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "memory ran out"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "memory ran out"),
        (RuntimeError(MPS), "memory ran out on asking for 500.00 MiB"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8589934592 bytes."),
         "memory ran out on asking for 8.00 GiB"),
        (RuntimeError("could not create a primitive"), "memory ran out"),
        (OSError(12, "Cannot allocate memory"), "memory ran out"),
        (MemoryError(), "memory ran out"),
        (torchs_own_on_a_cpu(), "memory ran out on asking for 1073741824.00 GiB"),
    ],
)  # fmt: skip
def test_a_want_of_memory_is_known_and_told_in_one_short_line(error, sentence):
    assert is_out_of_memory(error)
    assert memory_sentence(error) == sentence
    assert "\n" not in sentence
    assert len(sentence) < 80


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        UsageError("out of memory"),
        OSError(28, "No space left on device"),
        RuntimeError("could not create a primitive descriptor for the matmul primitive"),
    ],
    ids=lambda error: f"{type(error).__name__}-{error}"[:40],
)
def test_other_errors_are_not_a_want_of_memory(error):
    assert not is_out_of_memory(error)


GLOO = "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] "
NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3690, remote process exited or "


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError(GLOO + "Read error [127.0.0.1]:6284: Connection reset by peer. This is typically caused by bugs"),
         "Read error [127.0.0.1]:6284: Connection reset by peer"),
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:903"),
         "Connection closed by peer [::1]:903"),
        (torch.distributed.DistBackendError(NCCL + "there was a network error, NCCL version 2.27.5\nncclRemoteError"),
         "there was a network error, NCCL version 2.27.5)"),
        (RuntimeError("Connection closed by peer" + " word" * 100), "word...)"),
    ],
    ids=["gloo", "gloo-closed", "nccl", "long"],
)  # fmt: skip
def test_a_lost_rank_is_told_in_words_that_help(error, words):
    assert is_lost_rank(error)
    sentence = lost_sentence("0", error)
    assert sentence.startswith("error: rank 0 has lost another, which has ended or can't be reached")
    assert "--init_from=auto, or resume, goes on from the last checkpoint (" in sentence
    assert words in sentence
