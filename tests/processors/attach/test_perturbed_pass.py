"""The perturbed pass: blocks in order, blocks that are skipped, and blocks whose work is reused from the plain pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_attn.errors import DitAttnError
from dit_attn.processors.attach import perturbed_pass


class JointTransformerBlock(torch.nn.Module):
    """Two streams, image and text, as SD3's block of this name returns them: text first."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.calls = factor, 0

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: Any = None) -> Any:
        """Both streams, scaled and mixed."""
        self.calls += 1
        return encoder_hidden_states * self.factor, hidden_states * self.factor + encoder_hidden_states.mean()


class AuraFlowSingleTransformerBlock(torch.nn.Module):
    """One stream."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift, self.calls = shift, 0

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The stream, shifted."""
        self.calls += 1
        return hidden_states.sin() + self.shift


class Model(torch.nn.Module):
    """Three joint blocks, then two single ones."""

    def __init__(self) -> None:
        super().__init__()
        self.joint = torch.nn.ModuleList([JointTransformerBlock(0.5 + i) for i in range(3)])
        self.single = torch.nn.ModuleList([AuraFlowSingleTransformerBlock(float(i)) for i in range(2)])

    def forward(self, hidden_states: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """All blocks, one after the other."""
        for block in self.joint:
            text, hidden_states = block(hidden_states, encoder_hidden_states=text)
        for block in self.single:
            hidden_states = block(hidden_states)
        return hidden_states

    @property
    def calls(self) -> list[int]:
        """Calls of every block."""
        return [block.calls for block in (*self.joint, *self.single)]  # type: ignore[misc]


BLOCKS = ["joint.0", "joint.1", "joint.2", "single.0", "single.1"]
X, TEXT = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.ones(4, 2)

# -- blocks -----------------------------------------------------------------------------------------------------------


def test_all_blocks_of_a_stack_are_listed_in_the_order_they_run() -> None:
    layers = ["joint.1.attn", "joint.2.attn", "single.0.attn.inner.3"]
    assert perturbed_pass.block_order(Model(), layers) == BLOCKS
    assert perturbed_pass.block_order(Model(), ["single.1.attn"]) == BLOCKS[3:]


@pytest.mark.parametrize(
    ("layers", "skipped", "first"),
    [
        (["joint.1.attn"], [], 1),
        (["single.1.attn", "joint.2.attn"], [], 2),
        (["single.1.attn"], ["joint.0"], 0),
        ([], ["single.0"], 3),
    ],
)  # fmt: skip
def test_the_first_block_that_differs(layers: list[str], skipped: list[str], first: int) -> None:
    assert perturbed_pass.first_block(BLOCKS, layers, skipped) == first


# -- skipping ---------------------------------------------------------------------------------------------------------


def test_a_skipped_block_returns_its_streams_in_the_order_of_its_outputs() -> None:
    model = Model()
    joint, single = perturbed_pass.skip_forward(model.joint[0]), perturbed_pass.skip_forward(model.single[0])
    for found in (joint(X, TEXT), joint(hidden_states=X, temb=None, encoder_hidden_states=TEXT)):
        assert found[0] is TEXT and found[1] is X
    assert single(X) is X and single(hidden_states=X) is X
    assert model.calls == [0] * 5


def test_a_block_whose_streams_are_unknown_is_refused_with_the_remedy() -> None:
    with pytest.raises(DitAttnError, match=r"Linear cannot be skipped.*STG\(mode='attention'\) or SoftPAG"):
        perturbed_pass.skip_forward(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("fails", [False, True])
def test_forwards_are_replaced_for_the_block_and_restored_however_it_ends(fails: bool) -> None:
    model = Model()
    first, second = model.single
    own = lambda hidden_states: hidden_states * 10  # noqa: E731
    first.forward = own  # other code's, on the instance
    second._compiled_call_impl = lambda hidden_states: hidden_states * 100  # type: ignore[assignment]  # a compiled block
    try:
        with perturbed_pass.replaced_forwards({first: lambda x: x + 1, second: lambda x: x + 2}):
            assert torch.equal(second(first(X)), X + 1 + 2)
            if fails:
                raise InterruptedError
    except InterruptedError:
        assert fails
    assert first.forward is own and torch.equal(second(X), X * 100) and "forward" not in vars(second)


# -- reuse ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [1, 2, 3, 4])
@pytest.mark.parametrize("index", [[0, 1, 2, 3], [1, 3], [2]], ids=str)
def test_a_second_pass_with_reused_blocks_is_the_full_pass_over_its_rows(first: int, index: list[int]) -> None:
    model = Model()
    prefix = perturbed_pass.Prefix(model, BLOCKS[: first + 1], {})
    prefix.record()
    plain = model(X, TEXT)
    assert prefix.saved == first
    found = prefix.replacements(index, 4, {})
    prefix.clear()
    reused = found[model.get_submodule(BLOCKS[0])]()
    assert len(reused[0]) == len(reused[1]) == len(index)  # code between the blocks gets results of the right form
    with perturbed_pass.replaced_forwards(found):
        again = model(X[index], TEXT[index])
    assert torch.equal(again, plain[index])
    assert model.calls == [1] * first + [2] * (5 - first)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in (*model.joint, *model.single))


def test_a_skipped_block_at_the_border_is_skipped_with_its_recorded_input() -> None:
    model = Model()
    prefix = perturbed_pass.Prefix(model, BLOCKS[:3], {})
    prefix.record()
    model(X, TEXT)
    border = model.joint[2]
    skip = perturbed_pass.skip_forward(border)
    with perturbed_pass.replaced_forwards({border: skip}):
        expected = model(X, TEXT)
    with perturbed_pass.replaced_forwards(prefix.replacements([0, 1, 2, 3], 4, {border: skip})):
        assert torch.equal(model(X, TEXT), expected)
    assert model.calls == [2, 2, 1, 3, 3]


def test_recording_again_forgets_the_last_pass() -> None:
    model = Model()
    prefix = perturbed_pass.Prefix(model, BLOCKS[:2], {})
    prefix.record()
    model(X, TEXT)
    prefix.record()
    assert prefix.inputs is None and not prefix.results
    model(X + 1, TEXT)
    assert prefix.inputs is not None and len(model.joint[0]._forward_hooks) == 1
    with perturbed_pass.replaced_forwards(prefix.replacements([0, 1, 2, 3], 4, {})):
        found = model(X, TEXT)
    assert torch.equal(found, model(X + 1, TEXT))
    prefix.clear()
    assert prefix.inputs is None and not prefix.handles and not model.joint[0]._forward_hooks
