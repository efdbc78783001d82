"""`axis="sample"` in training: unbiased gradients, several processes' graphs, Hugging Face."""

import copy
import warnings
from collections import Counter

import pytest
import torch
from oracle import relative_error
from sample_oracle import kept_gradients, strongest
from ssprop_passes.errors import NoEffectWarning
from ssprop_passes.selection.samples import sample_scores
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, ssprop_compile
from ssprop_fx.compiler import sample_choice

DRAWS = 20_000
BATCH, KEPT = 6, 3


class Sentences(nn.Module):
    """Embeddings, layer norms, residuals, a class token: everything that has parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.norm = nn.LayerNorm(4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words)
        x = torch.cat([self.token.expand(len(words), -1, -1), x], 1)
        x = x + torch.tanh(self.mix(self.norm(x)))
        return self.head(x.mean(1))


def test_draws_are_unbiased_for_every_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean gradient of many draws is within four standard errors of the dense gradient."""
    torch.manual_seed(0)
    model = Sentences().double()
    words, labels = torch.randint(5, (BATCH, 3)), torch.randint(3, (BATCH,))
    config = SparsityConfig(axis="sample", select="sampled")
    scheduler = SparsityScheduler(constant(0.5))
    compiled = ssprop_compile(model, scheduler, config=config, backend="aot_eager")
    logits = model(words)
    logits.retain_grad()
    functional.cross_entropy(logits, labels).backward()
    dense = all_gradients(model)
    assert logits.grad is not None
    # A choice of samples determines all gradients: take a step once for each.
    draws: Counter[tuple[int, ...]] = Counter()
    choices: dict[tuple[int, ...], tuple[Tensor, Tensor | None]] = {}
    for _ in range(DRAWS):
        scores = sample_scores(config.selection, [logits.grad])
        made = sample_choice.choose_samples(config.selection, scores, KEPT)
        key = tuple(made[0].tolist())
        draws[key] += 1
        choices[key] = made
    gradients = []
    for made in choices.values():
        monkeypatch.setattr(sample_choice, "choose_samples", lambda *_args, made=made: made)
        functional.cross_entropy(compiled(words), labels).backward()
        gradients.append(all_gradients(model))
    found = torch.stack(gradients)
    share = torch.tensor([draws[key] / DRAWS for key in choices], dtype=torch.float64)[:, None]
    mean = (share * found).sum(0)
    error = ((share * (found - mean).square()).sum(0) / DRAWS).sqrt()
    assert len(choices) > 5
    assert ((mean - dense).abs() <= 4 * error + 1e-12).all()


def all_gradients(model: nn.Module) -> Tensor:
    """Return the gradients of all parameters as one vector, and forget them."""
    assert all(p.grad is not None for p in model.parameters())
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("outside", [True, False])
def test_buckets_share_one_choice(monkeypatch: pytest.MonkeyPatch, outside: bool) -> None:
    """DistributedDataParallel splits the graph into a graph for each bucket of gradients."""
    # Small buckets, so that this small model has several, and so several graphs.
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 1500)
    torch.manual_seed(0)
    model, x = Layers(), torch.randn(BATCH, 16)

    def loss(output: Tensor) -> Tensor:
        return (output.sin() * torch.arange(1.0, BATCH + 1)[:, None]).sum()

    want = kept_gradients(copy.deepcopy(model), (x,), loss, lambda g: strongest(g, KEPT), BATCH)
    scheduler, config = SparsityScheduler(constant(0.5)), SparsityConfig(axis="sample")
    options = {"config": config, "backend": "aot_eager"}
    if outside:
        compiled = ssprop_compile(model, scheduler, **options)
        network = DistributedDataParallel(compiled, bucket_cap_mb=0.002)
    else:
        ddp = DistributedDataParallel(model, bucket_cap_mb=0.002)
        network = compiled = ssprop_compile(ddp, scheduler, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoEffectWarning)
        for _ in range(2):
            model.zero_grad()
            loss(network(x)).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert len(compiled.ssprop.graphs) > 1
    assert relative_error(found, want) < 1e-5


def test_hugging_face_returns_the_loss() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = transformers.BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertForSequenceClassification(settings).double()
    words, labels = torch.randint(30, (BATCH, 5)), torch.randint(2, (BATCH,))
    scheduler, config = SparsityScheduler(constant(0.5)), SparsityConfig(axis="sample")
    compiled = ssprop_compile(model, scheduler, config=config, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoEffectWarning)
        compiled(input_ids=words, labels=labels).loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    logits = model(input_ids=words).logits

    model.zero_grad()
    grad = torch.autograd.grad(
        functional.cross_entropy(leaf := logits.detach().requires_grad_(), labels), leaf
    )[0]
    logits.backward(grad * strongest([grad], KEPT)[:, None])
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert relative_error(found, want) < 1e-9
