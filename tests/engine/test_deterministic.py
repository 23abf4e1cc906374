"""--deterministic chooses algorithms, and does nothing else."""

import torch

import utils


def test_deterministic_algorithms_do_not_fill_new_memory(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    state = torch.get_rng_state()
    try:
        utils.seed_everything(0, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        torch.full((256,), 7.0)  # memory that the next tensor may get
        assert not torch.empty(256).isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_rng_state(state)


def test_other_runs_leave_the_setting_alone(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    state = torch.get_rng_state()
    utils.seed_everything(0)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled()
    torch.set_rng_state(state)
