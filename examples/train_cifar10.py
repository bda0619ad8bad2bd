"""Trains a ConvMixer on CIFAR-10 with the recipe of the paper's appendix B.

    python examples/train_cifar10.py cifar-10-batches-bin                              # one GPU, or the CPU
    torchrun --nproc-per-node=4 examples/train_cifar10.py cifar-10-batches-bin         # several GPUs

The folder holds the data set's binary version: data_batch_1.bin to data_batch_5.bin and test_batch.bin, each a sequence
of records of one byte of label and 3072 of image (https://www.cs.toronto.edu/~kriz/cifar.html).

AdamW with a triangular learning rate, RandAugment, mixup, CutMix, random erasing and gradient clipping. What the
appendix leaves open is as in the authors' published training commands.

Stop it at any time and start it again: it goes on from checkpoint.pt and ends with the same weights as without the
stop. All that is random follows from the seed, the epoch and the place in it, so there is no generator to restore. In
--out there are also log.csv, curves.png and, at the end, weights.pt for convmixer_fast.load_checkpoint.
"""

import argparse
import csv
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from tqdm import tqdm

import convmixer_fast
from convmixer_fast.files import open_regular, printable, replacing

TRAIN_FILES = [f"data_batch_{i}.bin" for i in range(1, 6)]
TEST_FILE = "test_batch.bin"
SIDE, N_CLASSES = 32, 10
RECORD = 1 + 3 * SIDE * SIDE
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
AUGMENT, MIX = range(2)  # what a seed is for
SETTINGS = ("model", "epochs", "batch_size", "lr", "weight_decay", "seed", "amp", "processes")  # that change the result


def read_records(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 3, 32, 32) and labels (N,) of a file, uint8. Exits with the file's name if it is not one."""
    try:
        with open_regular(path) as file:
            content = np.fromfile(file, np.uint8)
    except OSError as error:
        sys.exit(f"{path}: {error.strerror or error}; the folder must hold CIFAR-10's binary version")
    if content.size == 0 or content.size % RECORD:
        sys.exit(f"{path}: {content.size} bytes are not one or more records of {RECORD} bytes")
    labels, images = np.split(content.reshape(-1, RECORD), [1], axis=1)
    if labels.max() >= N_CLASSES:
        sys.exit(f"{path}: a label is {labels.max()}, accepted: 0 to {N_CLASSES - 1}")
    return images.reshape(-1, 3, SIDE, SIDE), labels[:, 0]


def seed_all(*key: int) -> None:
    """Seeds the generators that augmentation draws from by what is to be augmented."""
    seeds = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(seeds[0]))
    np.random.seed(seeds[1])
    torch.random.default_generator.manual_seed(int(seeds[2]))


class AugmentedImages(Dataset):
    """Training images by (epoch, index), augmented as that epoch's, whichever process asks for them."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, seed: int):
        self.images, self.labels, self.seed = images, labels, seed
        # A magnitude of 10 would leave no bits to PosterizeIncreasing, which Pillow refuses.
        fill = tuple(round(255 * value) for value in MEAN)
        limits = dict(magnitude_max=9.99, translate_const=int(0.45 * SIDE), img_mean=fill)
        self.augment = transforms.Compose(
            [
                transforms.RandomResizedCrop(SIDE, scale=(0.75, 1.0), ratio=(1.0, 1.0)),
                transforms.RandomHorizontalFlip(),
                rand_augment_transform("rand-m9-mstd0.5-inc1", limits),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
                RandomErasing(0.25, mode="pixel", device="cpu"),
            ]
        )

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = place
        seed_all(self.seed, AUGMENT, epoch, index)
        image = Image.fromarray(self.images[index].transpose(1, 2, 0))
        return self.augment(image), int(self.labels[index])


@dataclass
class Progress:
    """How far the training is."""

    step: int = 0  # batches, of all epochs
    loss: float = 0.0  # sum over the epoch's batches so far
    seconds: float = 0.0  # spent on the epoch so far
    log: list[dict[str, float]] = field(default_factory=list)  # a row an epoch


class Batches:
    """The places of every batch from a step on, to the end of the training: one process's share of each."""

    def __init__(self, n_images: int, args: argparse.Namespace, rank: int):
        self.n_images, self.args, self.rank, self.first = n_images, args, rank, 0
        self.per_epoch = n_images // args.batch_size  # the rest takes part in another epoch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in range(self.first // self.per_epoch, self.args.epochs):
            order = np.random.default_rng([self.args.seed, epoch]).permutation(self.n_images)
            first = max(0, self.first - epoch * self.per_epoch)
            for batch in order[: self.per_epoch * self.args.batch_size].reshape(self.per_epoch, -1)[first:]:
                yield [(epoch, int(index)) for index in batch[self.rank :: self.args.processes]]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Up to the peak in two fifths of the steps, down to a twentieth of it in the next two, to 0 in the last."""
    return float(np.interp((step + 0.5) / steps, [0, 0.4, 0.8, 1], [0, peak, peak / 20, 0]))


@torch.no_grad()
def accuracy(model: nn.Module, images: np.ndarray, labels: np.ndarray, args: argparse.Namespace) -> float:
    model.eval()
    mean, std = (torch.tensor(values, device=args.device).view(3, 1, 1) for values in (MEAN, STD))
    correct = 0
    for start in range(0, len(images), args.batch_size):
        batch = torch.from_numpy(images[start : start + args.batch_size]).to(args.device)
        with torch.autocast(args.device.type, args.amp_dtype, enabled=args.amp_dtype is not None):
            predictions = model((batch / 255 - mean) / std).argmax(1)
        correct += (predictions.cpu().numpy() == labels[start : start + args.batch_size]).sum()
    model.train()
    return float(correct / len(images))


def write_log(out: Path, log: list[dict[str, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def write_csv(path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, log[0])
            writer.writeheader()
            writer.writerows(log)

    def write_png(path: Path) -> None:
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
        epochs = [row["epoch"] for row in log]
        for axes, name in ((left, "train_loss"), (right, "test_accuracy")):
            axes.plot(epochs, [row[name] for row in log], marker="." if len(log) < 30 else "")
            axes.set(xlabel="epoch", title=name.replace("_", " "))
            axes.grid(alpha=0.3)
        figure.savefig(path, format="png", dpi=120)
        plt.close(figure)

    for name, write in (("log.csv", write_csv), ("curves.png", write_png)):
        with replacing(out / name) as partial:
            write(partial)


class Training:
    """The model with all that a checkpoint holds."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.progress = args, Progress()
        torch.manual_seed(args.seed)
        self.model = convmixer_fast.create_model(args.model, n_classes=N_CLASSES).to(args.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), args.lr, eps=1e-3, weight_decay=args.weight_decay)
        self.scaler = torch.amp.GradScaler(args.device.type, enabled=args.amp_dtype == torch.float16)

    @property
    def path(self) -> Path:
        return self.args.out / "checkpoint.pt"

    def save(self) -> None:
        state = dict(
            settings={name: getattr(self.args, name) for name in SETTINGS},
            progress=vars(self.progress),
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
        )
        with replacing(self.path) as partial:
            torch.save(state, partial)

    def load(self) -> None:
        """Exits with the file's name if it is damaged, or of a training with other settings."""
        try:
            with open_regular(self.path) as file:
                state = torch.load(file, map_location=self.args.device, weights_only=True)
            for name, saved in state["settings"].items():
                if saved != (given := getattr(self.args, name)):
                    sys.exit(f"{self.path}: this training was begun with {name} = {saved!r}, got {given!r}")
            self.progress = Progress(**state["progress"])
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
        except Exception as error:  # damaged bytes make the reader raise nearly every type
            reason = printable(f"{type(error).__name__}: {error}", 300)
            sys.exit(f"{self.path} is no checkpoint of this training, remove it to begin anew: {reason}")


def train(args: argparse.Namespace, rank: int) -> None:
    images, labels = map(np.concatenate, zip(*(read_records(args.data / name) for name in TRAIN_FILES)))
    test_images, test_labels = read_records(args.data / TEST_FILE)
    if len(images) < args.batch_size:
        sys.exit(f"--batch-size {args.batch_size} is more than the {len(images)} training images")
    training = Training(args)
    if training.path.exists():
        training.load()
    progress, optimizer, scaler = training.progress, training.optimizer, training.scaler
    model = training.model
    if args.processes > 1:
        model = nn.parallel.DistributedDataParallel(model)

    batches = Batches(len(images), args, rank)
    batches.first = progress.step
    steps = args.epochs * batches.per_epoch
    loader = DataLoader(
        AugmentedImages(images, labels, args.seed),
        batch_sampler=batches,
        num_workers=args.workers,
        pin_memory=args.device.type == "cuda",
    )
    mix = Mixup(mixup_alpha=0.5, cutmix_alpha=0.5, label_smoothing=0.1, num_classes=N_CLASSES)
    bar = tqdm(total=steps, initial=progress.step, unit="step", disable=None if rank == 0 else True)
    mark = time.perf_counter()
    model.train()
    for x, target in loader:
        seed_all(args.seed, MIX, progress.step, rank)
        x, target = mix(x.to(args.device, non_blocking=True), target.to(args.device, non_blocking=True))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress.step, steps, args.lr)
        with torch.autocast(args.device.type, args.amp_dtype, enabled=args.amp_dtype is not None):
            loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

        progress.step += 1
        progress.loss += loss.item()
        progress.seconds += time.perf_counter() - mark
        mark = time.perf_counter()
        bar.update()
        if rank == 0 and progress.step % batches.per_epoch == 0:
            row = dict(
                epoch=progress.step // batches.per_epoch,
                learning_rate=optimizer.param_groups[0]["lr"],
                train_loss=progress.loss / batches.per_epoch,
                test_accuracy=accuracy(training.model, test_images, test_labels, args),
                images_per_second=batches.per_epoch * args.batch_size / progress.seconds,
            )
            progress.log.append(row)
            progress.loss = progress.seconds = 0.0
            bar.set_postfix_str(f"loss {row['train_loss']:.3f}, accuracy {row['test_accuracy']:.2%}")
            write_log(args.out, progress.log)
        if rank == 0 and (progress.step % args.save_every == 0 or progress.step % batches.per_epoch == 0):
            training.save()
            mark = time.perf_counter()
    bar.close()
    if rank == 0:
        weights = {name: tensor.cpu() for name, tensor in training.model.state_dict().items()}
        with replacing(args.out / "weights.pt") as partial:
            torch.save(weights, partial)
        last = progress.log[-1]
        print(f"epoch {last['epoch']}: loss {last['train_loss']:.4f}, test accuracy {last['test_accuracy']:.2%}")


def show_stopped(out: Path) -> None:
    """Prints the finished epochs, and where the same command goes on."""
    finished, checkpoint = out / "log.csv", out / "checkpoint.pt"
    print(finished.read_text() if finished.exists() else "no epoch is finished")
    print(f"stopped by Ctrl-C; the same command goes on from {checkpoint if checkpoint.exists() else 'the beginning'}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the data set's .bin files")
    parser.add_argument("--out", type=Path, default=Path("cifar10"), help="folder of the results (%(default)s)")
    parser.add_argument("--model", default="convmixer_256_8_k9_p1", help="of list_models() (%(default)s)")
    parser.add_argument("--epochs", type=int, default=200, help="(%(default)s)")
    parser.add_argument("--batch-size", type=int, default=512, help="of all processes together (%(default)s)")
    parser.add_argument("--lr", type=float, default=0.05, help="peak of the learning rate (%(default)s)")
    parser.add_argument("--weight-decay", type=float, default=0.005, help="(%(default)s)")
    parser.add_argument("--amp", choices=("float16", "bfloat16", "none"), help="(float16 on a GPU, none on a CPU)")
    parser.add_argument("--workers", type=int, default=4, help="processes that augment images (%(default)s)")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS", help="a checkpoint (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    args = parser.parse_args(argv)
    args.processes = int(os.environ.get("WORLD_SIZE", 1))
    for name, least in dict(epochs=1, batch_size=1, save_every=1, workers=0, seed=0).items():
        if getattr(args, name) < least:
            parser.error(f"argument --{name.replace('_', '-')}: must be at least {least}, got {getattr(args, name)}")
    if args.batch_size % (2 * args.processes):
        parser.error(
            f"argument --batch-size: must be a multiple of {2 * args.processes} (mixup pairs the images of each of "
            f"{args.processes} process(es)), got {args.batch_size}"
        )
    if args.model not in convmixer_fast.list_models():
        parser.error(f"argument --model: must be one of convmixer_fast.list_models(), got {args.model!r}")
    on_gpu = torch.cuda.is_available()
    args.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    args.amp = args.amp or ("float16" if on_gpu else "none")
    args.amp_dtype = None if args.amp == "none" else getattr(torch, args.amp)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.deterministic = True  # a stop and a restart must not change the result
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    if args.processes > 1:
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
    rank = dist.get_rank() if args.processes > 1 else 0
    try:
        train(args, rank)
    except KeyboardInterrupt:
        if rank == 0:
            show_stopped(args.out)
        sys.exit(128 + signal.SIGINT)
    finally:
        if args.processes > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
