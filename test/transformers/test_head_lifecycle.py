"""A model with a fused head is undone, copied, pickled, resized, hooked and wrapped as any other."""

import copy
import importlib
import inspect
import io
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from support import tiny_model
from support_head import agree, both, tokens

pytest.importorskip("transformers")

from liger_kernel.transformers import apply_liger_kernel, revert_liger_kernel  # noqa: E402
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


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("ran", [True, False], ids=["after a step", "never run"])
def test_an_unpickled_model_is_fused_and_comes_off(ran, fused_calls):
    model, fused, patch = both()
    if ran:
        fused(**tokens()).loss.backward()
        fused.zero_grad()
        fused_calls.clear()
    loaded = saved_and_loaded(fused)
    patch.undo()
    assert inspect.signature(loaded.forward) == inspect.signature(model.forward)
    output, _ = agree(model, loaded, tokens())
    assert isinstance(output.logits, LazyLogits) and output.logits.head is loaded.lm_head and len(fused_calls) == 1
    assert isinstance(saved_and_loaded(loaded)(**tokens()).logits, LazyLogits)
    fuse_head(loaded).undo()
    assert loaded.__dict__.keys() == model.__dict__.keys()
    assert loaded.lm_head.__dict__.keys() == model.lm_head.__dict__.keys()


def test_an_unpickled_model_can_be_undone_before_it_runs():
    model, fused, _ = both()
    loaded = saved_and_loaded(fused)
    fuse_head(loaded).undo()
    assert loaded.__dict__.keys() == model.__dict__.keys()
    assert isinstance(loaded(**tokens()).logits, torch.Tensor)


def test_a_patched_model_keeps_its_head_through_pickle():
    model = tiny_model("llama")
    apply_liger_kernel(model)
    try:
        loaded = saved_and_loaded(model)
        assert isinstance(loaded(**tokens()).logits, LazyLogits)
        assert str(apply_liger_kernel(loaded)) == str(apply_liger_kernel(model))
        revert_liger_kernel(loaded)
        assert isinstance(loaded(**tokens()).logits, torch.Tensor)
    finally:
        revert_liger_kernel(model)


def replicated(model, n, monkeypatch):
    """nn.DataParallel's replicas of a model on n devices that are all this one: copies whose gradients flow back."""
    module = importlib.import_module("torch.nn.parallel.replicate")

    def broadcast(tensors, devices, detach=False):
        return [[t.detach() if detach else t.clone() for t in tensors] for _ in devices]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", broadcast)
    return module.replicate(model, list(range(n)))


@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "lora"])
def test_replicas_of_data_parallel_are_fused_on_their_own_parameters(adapter, fused_calls, monkeypatch):
    model = tiny_model("llama", tie_word_embeddings=False)
    patched = copy.deepcopy(model)
    apply_liger_kernel(patched)
    made = [model, patched]
    if adapter:
        peft = pytest.importorskip("peft")
        for i in range(2):
            torch.manual_seed(1)
            config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["lm_head", "q_proj"])
            made[i] = peft.get_peft_model(made[i], config).train()
    model, patched = made
    replicas = replicated(patched, 2, monkeypatch)
    used = {name for name, p in patched.named_parameters() if p.requires_grad}
    given = [tokens(), tokens()]
    try:
        with ThreadPoolExecutor(2) as threads:
            outputs = list(threads.map(lambda replica, batch: replica(**batch), replicas, given))
        assert len(fused_calls) == 2 and all(output.logits is None for output in outputs)
        sum(output.loss for output in outputs).backward()
        for batch, output in zip(given, outputs):
            loss = model(**batch).loss
            torch.testing.assert_close(output.loss, loss)
            loss.backward()
        theirs = dict(model.named_parameters())
        for name, p in patched.named_parameters():
            assert (p.grad is not None) == (name in used)
            if p.grad is not None:
                torch.testing.assert_close(p.grad, theirs[name].grad, rtol=1e-4, atol=1e-5, msg=name)
        with torch.no_grad():
            assert torch.equal(replicas[0].eval()(**given[0]).logits, patched.eval()(**given[0]).logits)
        assert len(fused_calls) == 2
        patched.train()(**given[0])
        assert len(fused_calls) == 3  # the model itself is as it was
    finally:
        revert_liger_kernel(patched)


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


@pytest.mark.parametrize("return_dict", [True, False])
def test_a_replicas_outputs_can_be_gathered_though_its_logits_were_lazy(return_dict, fused_calls, monkeypatch):
    """nn.DataParallel on a CPU: its own functions, but for those that copy from device to device."""
    replicate = importlib.import_module("torch.nn.parallel.replicate")
    gather = importlib.import_module("torch.nn.parallel.scatter_gather")
    clones = lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices]  # noqa: E731
    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", clones)
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, optional: device)
    monkeypatch.setattr(gather.Gather, "apply", lambda device, dim, *parts: torch.stack(parts))
    model = tiny_model("llama")
    patched, given = copy.deepcopy(model), tokens(rows=4)
    apply_liger_kernel(patched)
    count = (given["labels"][:, 1:] != -100).sum()
    halves = [{k: v[i : i + 2] if isinstance(v, torch.Tensor) else v for k, v in given.items()} for i in (0, 2)]
    replicas = replicate.replicate(patched, [0, 1])
    with ThreadPoolExecutor(2) as threads:
        outputs = list(threads.map(
            lambda replica, half: replica(**half, num_items_in_batch=count[None], return_dict=return_dict),
            replicas, halves,
        ))  # fmt: skip
    output = gather.gather(outputs, 0)
    loss = output.loss if return_dict else output[0]
    loss.sum().backward()
    model(**given).loss.backward()
    assert len(fused_calls) == 2 and (not return_dict or output.logits is None)
    for (name, p), q in zip(model.named_parameters(), patched.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_data_parallel_trains_as_one_device_does(fused_calls):
    model = tiny_model("llama").cuda()
    patched = copy.deepcopy(model)
    apply_liger_kernel(patched)
    parallel = torch.nn.DataParallel(patched, [0, 1])
    given = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in tokens(rows=4).items()}
    count = (given["labels"][:, 1:] != -100).sum()
    try:
        # each replica is given its own copy of the count, in a tensor of one element
        output = parallel(**given, num_items_in_batch=count.expand(2))
        output.loss.sum().backward()
        model(**given).loss.backward()
        assert len(fused_calls) == 2 and output.logits is None
        for (name, p), q in zip(model.named_parameters(), patched.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5, msg=name)
    finally:
        revert_liger_kernel(patched)


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
