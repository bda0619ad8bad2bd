"""Trains a ConvMixer on scikit-learn's handwritten digits, saves it, loads it, optimizes it: accuracy and speed.

    python examples/digits.py

The data are 1797 real 8x8 grey images that ship with scikit-learn; a quarter, stratified, is held out for the test.
"""

import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import trange

from convmixer_fast import ConvMixer, load_checkpoint, optimize

EPOCHS = 8
BATCH_SIZE = 64
LEARNING_RATE = 5e-3
TIMED_RUNS = 15


def load_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (N, 1, 8, 8) and labels (N,), then the same for the test, standardised by the training set."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    train, test = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) for part in split[:2])
    train_labels, test_labels = (torch.tensor(part, dtype=torch.int64) for part in split[2:])
    std, mean = torch.std_mean(train)
    return (train - mean) / std, train_labels, (test - mean) / std, test_labels


def shift(images: Tensor) -> Tensor:
    """The batch moved by up to one pixel each way, filled with what is at the border."""
    top, left = torch.randint(3, (2,)).tolist()
    return F.pad(images, (1, 1, 1, 1), mode="replicate")[..., top : top + 8, left : left + 8]


def train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    batches = len(images) // BATCH_SIZE  # the last, smaller one is left out: BatchNorm likes even batches
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=EPOCHS * batches)
    model.train()
    for _ in trange(EPOCHS, desc="training", unit="epoch", leave=False, disable=None):
        for batch in torch.randperm(len(images))[: batches * BATCH_SIZE].split(BATCH_SIZE):
            loss = F.cross_entropy(model(shift(images[batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def milliseconds(models: list[nn.Module], images: Tensor) -> list[float]:
    """Median time of a forward pass of each model; interleaved, so that a busy machine slows all of them alike."""
    times = [[] for _ in models]
    for _ in range(TIMED_RUNS + 1):
        for model, elapsed in zip(models, times):
            start = time.perf_counter()
            model(images)
            elapsed.append(1e3 * (time.perf_counter() - start))
    return [median(elapsed[1:]) for elapsed in times]  # the first run warms up


def main() -> None:
    torch.manual_seed(0)
    images, labels, test_images, test_labels = load_data()
    model = ConvMixer(dim=48, depth=3, kernel_size=5, patch_size=1, n_classes=10, in_channels=1)

    start = time.perf_counter()
    train(model, images, labels)
    print(f"trained         {EPOCHS} epochs on {len(images)} images in {time.perf_counter() - start:.1f} s")

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        checkpoint = Path(folder) / "digits.pt"
        torch.save(model.state_dict(), checkpoint)
        loaded = load_checkpoint(checkpoint, activation="gelu").eval()
        optimized = optimize(loaded)

        def report(name: str, candidate: nn.Module) -> Tensor:
            logits = candidate(test_images)
            correct = (logits.argmax(1) == test_labels).sum().item()
            print(f"{name:15} {correct}/{len(test_labels)} correct, test accuracy {correct / len(test_labels):.2%}")
            return logits

        trained_logits = report("trained", model)
        loaded_logits = report("loaded", loaded)
        optimized_logits = report("optimized", optimized)
        print(f"loading         changes the logits by at most {(loaded_logits - trained_logits).abs().max():.1e}")
        print(f"optimizing      changes the logits by at most {(optimized_logits - loaded_logits).abs().max():.1e}")

        before, after = milliseconds([loaded, optimized], test_images)
        print(f"forward pass    {before:.2f} ms before, {after:.2f} ms after: speed-up {before / after:.2f}x")


if __name__ == "__main__":
    main()
