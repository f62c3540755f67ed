"""Every kernel on a real GPU: right in small cases, and the same bits in every repetition. Skipped without one."""

import pytest
import torch

from tests.kernels.cases import all_kernels, run_case, tensors

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)
REPETITIONS = 1000
ALL = [
    pytest.param(kernel, case, dtype, id=f"{kernel.name}-{case.name}-{str(dtype).removeprefix('torch.')}")
    for kernel in all_kernels()
    for case in kernel.cases
    for dtype in case.dtypes
]


@pytest.mark.parametrize("kernel, case, dtype", [each for each in ALL if not each.values[1].production])
def test_the_twin_gives_what_the_reference_gives_in_float64(kernel, case, dtype):
    assert run_case(kernel, case, dtype, "cuda") <= (case.tolerance or kernel.tolerances[dtype])


@pytest.mark.parametrize("kernel, case, dtype", ALL)
def test_repetitions_give_the_same_bits(kernel, case, dtype):
    """Programs that talk through memory without waiting for each other would differ at times; so would a read of
    memory that nothing wrote."""
    torch.manual_seed(0)
    arguments = case.make("cuda", dtype)
    if kernel.why_not(**arguments) is not None:
        pytest.skip("this GPU cannot")

    def bits():
        torch.manual_seed(0)
        own = case.make("cuda", dtype)  # some arguments are written to
        results = tensors(kernel.triton(**own)) + tensors({k: v for k, v in own.items() if k not in kernel.scratch})
        return [each.contiguous().view(torch.uint8) for each in results]

    first = bits()
    # making large arguments takes longer than the kernel
    for _ in range(20 if case.production else REPETITIONS):
        assert all(map(torch.equal, bits(), first))
