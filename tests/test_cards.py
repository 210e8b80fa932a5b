"""Cards by their names, as people and drivers write them."""

import pytest

from nanofit import cards, settings
from nanofit.errors import UsageError


def test_each_card_is_found_by_its_own_name_alone():
    for card in cards.CARDS:
        assert cards.named(card.name) == cards.of_driver(f"NVIDIA {card.name}") == card
        assert card.memory_gb > 1
        assert card.sm_count >= 10
        assert (7, 0) <= card.capability <= (12, 0)


@pytest.mark.parametrize(
    ("gpu", "name", "memory_gb", "dtype"),
    [
        ("rtx3060", "RTX 3060", 12, "bfloat16"),
        ("4090", "RTX 4090", 24, "bfloat16"),
        ("geforce RTX 4060 Ti 16GB", "RTX 4060 Ti", 16, "bfloat16"),
        ("Tesla T4", "T4", 15, "float16"),
        ("NVIDIA A100-SXM4-80GB", "A100", 80, "bfloat16"),
        ("NVIDIA A100-PCIE-40GB", "A100", 40, "bfloat16"),
        ("Tesla V100-SXM2-32GB", "V100", 32, "float16"),
        ("12GB", "", 12, "bfloat16"),
        ("7.5 gib", "", 7.5, "bfloat16"),
    ],
)
def test_a_card_by_the_name_that_people_write(gpu, name, memory_gb, dtype):
    card = cards.named(gpu)
    assert (card.name, card.memory_gb, cards.best_dtype(card.capability)) == (name, memory_gb, dtype)


@pytest.mark.parametrize(
    ("gpu", "says"),
    [
        ("RTX 3061", "gpu='RTX 3061' is not known (did you mean RTX 3060 or "),
        ("RTX 3060 Laptop", "did you mean RTX 3060 Ti"),
        ("12", "gpu='12' is not known; for any other card, give its memory: --gpu=12GB"),
        ("0.5GB", "CUDA itself takes 0.50 GiB"),
    ],
)
def test_a_card_that_is_not_known(gpu, says):
    with pytest.raises(UsageError) as told:
        cards.named(gpu)
    assert says in str(told.value)


def test_a_plan_by_memory_alone_asks_for_the_card():
    config = dict(gpu="", device="cpu", dry_run=True, memory_limit_gb=12.0)
    with pytest.raises(UsageError, match="name the card that the plan is for"):
        settings.of_a_plan(config, {"dry_run", "memory_limit_gb"})
    assert settings.of_a_plan(config, {"dry_run", "memory_limit_gb", "device"}) == {}
    assert settings.of_a_plan(config, {"dry_run"}) == {}
