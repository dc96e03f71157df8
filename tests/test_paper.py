"""What a step does on a GPU, counted on the meta device: the counts are exact, so they may only fall."""

import pytest

from benchmarks.paper import serving, training
from benchmarks.real_sizes import PaperBase, paper_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> PaperBase:
    return paper_base("sd15", tmp_path_factory.mktemp("paper"))


def test_a_training_step_adds_few_kernels_and_waits_for_the_host_once(base: PaperBase) -> None:
    found = training(base).numbers()
    assert found["kernels"] <= 1.62 * found["base_kernels"]
    assert found["casts"] <= 9
    assert found["bytes"] <= 1.21 * found["base_bytes"]
    assert found["flops"] == pytest.approx(found["base_flops"], rel=0.02)
    assert found["host_reads"] == found["uploads"] == 1


def test_a_serving_step_of_the_same_company_is_one_upload_and_no_read(base: PaperBase) -> None:
    found = serving(base).numbers()
    assert found["kernels"] <= 1.34 * found["base_kernels"]
    assert found["host_reads"] == 0 and found["uploads"] == 1
