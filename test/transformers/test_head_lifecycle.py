"""A model with a fused head is undone, copied, pickled, resized, hooked and wrapped as any other."""

import copy
import inspect
import io
import warnings

import pytest
import torch

from support import tiny_model
from support_head import agree, both, tokens

pytest.importorskip("transformers")

from liger_kernel.transformers.fsdp import _FSDPForwardRedirection  # noqa: E402
from liger_kernel.transformers.head import fuse_head  # noqa: E402
from liger_kernel.transformers.lazy_logits import LazyLogits  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("on_device"),
    pytest.mark.filterwarnings("ignore:the logits of a fused LM head were used"),
]


def test_signature_stays_so_that_trainers_see_the_columns():
    model, fused, _ = both()
    assert inspect.signature(fused.forward) == inspect.signature(model.forward)


def test_fusing_twice_changes_nothing():
    _, fused, patch = both()
    before = dict(fused.__dict__)
    again = fuse_head(fused)
    assert fused.__dict__ == before and (again.name, again.pattern) == (patch.name, patch.pattern)
    again.undo()
    assert "forward" not in fused.__dict__


def test_undo_restores_model_and_head_exactly():
    model = tiny_model("gemma2")
    model.loss_function = own = model.loss_function
    before, head_before = dict(model.__dict__), dict(model.lm_head.__dict__)
    patch = fuse_head(model)
    model(**tokens()).loss.backward()
    patch.undo()
    assert model.__dict__ == before and model.lm_head.__dict__ == head_before and model._loss_function is own
    patch.undo()
    assert model.__dict__ == before


def test_deepcopy_is_fused_and_separate(fused_calls):
    _, fused, patch = both()
    copied = copy.deepcopy(fused)
    patch.undo()
    output = copied(**tokens())
    assert len(fused_calls) == 1 and output.logits.head is copied.lm_head
    fuse_head(copied).undo()
    assert "forward" not in copied.__dict__ and isinstance(copied(**tokens()).logits, torch.Tensor)


def test_pickle_gives_a_model_that_can_be_fused_again():
    model, fused, _ = both()
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    given = tokens()
    assert isinstance(loaded(**given).logits, torch.Tensor)
    fuse_head(loaded)
    assert isinstance(loaded(**given).logits, LazyLogits)
    agree(model, loaded, given)


def test_resized_head_stays_fused(fused_calls):
    _, fused, patch = both("llama")
    old = fused.lm_head
    fused.resize_token_embeddings(300, mean_resizing=False)
    assert fused.lm_head is not old
    output = fused(**tokens())
    assert len(fused_calls) == 1 and output.logits.shape[-1] == 300
    patch.undo()
    assert "forward" not in fused.lm_head.__dict__


@pytest.mark.parametrize("first", [True, False], ids=["fused first", "hooked first"])
def test_accelerate_hooks_still_run(first, fused_calls):
    hooks = pytest.importorskip("accelerate.hooks")

    class Counting(hooks.ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Counting.calls += 1
            return args, kwargs

    model = tiny_model("llama")
    fused = copy.deepcopy(model)
    if first:
        fuse_head(fused)
    hooks.add_hook_to_module(fused.lm_head, Counting())
    hooks.add_hook_to_module(fused, hooks.ModelHook())
    if not first:
        fuse_head(fused)
    agree(model, fused, tokens())
    assert len(fused_calls) == 1
    assert Counting.calls == 2  # for the lazy logits and around the use of the weight


def test_prepared_by_accelerate_it_stays_fused_and_comes_off(fused_calls, device):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    model = tiny_model("llama")
    patch = fuse_head(model)
    prepared = accelerate.Accelerator(mixed_precision="bf16", cpu=device.type == "cpu").prepare(model)
    assert isinstance(prepared(**tokens()).logits, LazyLogits) and len(fused_calls) == 1
    patch.undo()  # under accelerate's wrapper
    assert isinstance(prepared(**tokens()).logits, torch.Tensor) and len(fused_calls) == 1
    fuse_head(model)
    assert isinstance(prepared(**tokens()).logits, LazyLogits) and len(fused_calls) == 2
    accelerate.state.AcceleratorState._reset_state(True)  # its mixed precision is process-wide


def test_hook_on_the_head_sees_real_logits():
    _, fused, _ = both()
    seen = []
    with pytest.warns(UserWarning, match="hook"):
        fused.lm_head.register_forward_hook(lambda module, args, output: seen.append(output))
        fused(**tokens())
    assert len(seen) == 1 and isinstance(seen[0], torch.Tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused(**tokens())


def test_fsdp_redirection_runs_the_method_in_the_wrapper_call():
    class Wrapper(torch.nn.Module):
        gathered = False

        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            self.gathered = True
            try:
                return self.module(*args, **kwargs)
            finally:
                self.gathered = False

    wrapper = Wrapper(torch.nn.Linear(4, 3))
    x = torch.randn(2, 4)

    def method(module, x, factor):
        assert wrapper.gathered
        return module(x) * factor

    result = _FSDPForwardRedirection()(wrapper, method, wrapper.module, x, factor=2)
    torch.testing.assert_close(result, wrapper.module(x) * 2)
    assert "forward" not in wrapper.module.__dict__
