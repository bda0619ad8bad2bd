"""load_checkpoint on files with changes of every kind: it gives the weights that the file holds, or a ValueError.

A file that its checksums protect gives the weights that were saved, or none. For others torch.load and safetensors say
what they hold; where these refuse a file, load_checkpoint may read it only as it was before the change. Each file has
SECONDS: a file that takes longer is a finding."""

import collections
import io
import json
import random
import signal
import zipfile
from contextlib import contextmanager

import pytest
import safetensors.torch
import torch
from cases import fuzz_run
from networks import plain_convmixer, randomize
from test_checkpoint import View, limited_memory

from convmixer_fast import ConvMixer, load_checkpoint

SECONDS = 60  # by the clock; one file takes about a hundredth of a second, more on a busy machine
SIZES = dict(dim=3, depth=2, kernel_size=3, patch_size=2, n_classes=2, in_channels=1)


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def training_content(model):
    averaged = {f"module.{key}": tensor + 1 for key, tensor in model.state_dict().items()}
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return {"epoch": 3, "state_dict": model.state_dict(), "state_dict_ema": averaged, "optimizer": optimizer}


def flip_bits(content, rng):
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def set_bytes(content, rng):
    start = rng.randrange(len(content))
    length = rng.choice([1, 2, 4, 8])
    value = rng.choice([b"\0", b"\xff", b"\x7f", b"\x80", rng.randbytes(1)]) * length
    return (content[:start] + value + content[start + length :])[: len(content)]


def cut(content, rng):
    return content[: rng.randrange(len(content))]


def insert(content, rng):
    start = rng.randrange(len(content))
    return content[:start] + rng.randbytes(rng.choice([1, 4, 64])) + content[start:]


def remove(content, rng):
    start = rng.randrange(len(content))
    return content[:start] + content[start + rng.choice([1, 4, 64]) :]


def copy_part(content, rng):
    start, length, target = rng.randrange(len(content)), rng.choice([1, 8, 200]), rng.randrange(len(content))
    return content[:target] + content[start : start + length] + content[target + rng.choice([0, length]) :]


BYTES = (flip_bits, flip_bits, set_bytes, cut, insert, remove, copy_part)


def zip_again(content, rng, change):
    """The zip with its list of (name, content) changed, and checksums that fit."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    change(entries, rng)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in entries:
            compression = rng.choice([zipfile.ZIP_STORED] * 60 + [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
            archive.writestr(name, data, compression)
    return buffer.getvalue()


def rename_entry(entries, rng):
    i, j = rng.randrange(len(entries)), rng.randrange(len(entries))
    name = rng.choice([entries[j][0], entries[i][0] + "0", "other/data.pkl", "x", "archive/../data.pkl"])
    entries[i] = (name, entries[i][1])


def swap_entries(entries, rng):
    i, j = rng.randrange(len(entries)), rng.randrange(len(entries))
    (first, a), (second, b) = entries[i], entries[j]
    entries[i], entries[j] = (first, b), (second, a)


def remove_entry(entries, rng):
    del entries[rng.randrange(len(entries))]


def change_entry(entries, rng):
    i = rng.randrange(len(entries))
    name, data = entries[i]
    entries[i] = (name, rng.choice(BYTES)(data, rng) if data else b"0")


def change_pickle(entries, rng):
    i = next(i for i, (name, _) in enumerate(entries) if name.endswith("data.pkl"))
    entries[i] = (entries[i][0], rng.choice(BYTES)(entries[i][1], rng))


ZIPS = (rename_entry, swap_entries, remove_entry, change_entry, change_pickle, change_pickle, change_pickle)


def change_state(state, rng):
    """Another dtype, view, key or value of one tensor."""
    state = dict(state)
    key = rng.choice(list(state))
    tensor = state[key]
    numbers = [0, 1, 2, 3, 7, -1, 1 << 31, 1 << 62, 1 << 70]
    kind = rng.randrange(7)
    if kind == 0:
        state[key] = tensor.to(rng.choice([torch.float64, torch.float16, torch.int32, torch.complex64, torch.bool]))
    elif kind == 1:
        elements = rng.choice([1, 3, 27, 1000])
        shape, strides = (tuple(rng.choice(numbers) for _ in range(rng.randrange(5))) for _ in range(2))
        state[key] = View(elements, rng.choice(numbers), shape, strides)
    elif kind == 2:
        shape = tuple(tensor.shape)
        strides = tuple(rng.choice([0, 1, stride]) for stride in tensor.stride())
        state[key] = View(tensor.numel() + rng.randrange(3), rng.choice([0, 1]), shape, strides)
    elif kind == 3:
        other = rng.choice(list(state))
        state[other], state[key] = state[key], state[other]
    elif kind == 4:
        del state[key]
        if rng.randrange(3):
            state[rng.choice(["module.", "x", ""]) + rng.choice([key[1:], key + "0", key.replace("0", "1")])] = tensor
    elif kind == 5:
        state[key] = rng.choice([None, 3, "text", [tensor], {key: tensor}, tensor.to_sparse()])
    else:
        state = {rng.choice(["module.", "ema.", "a.b."]) + name: value for name, value in state.items()} | {key: tensor}
    return rng.choice([state, {"state_dict": state}, {"a": {"model": state}}])


def change_header(content, rng):
    """A .safetensors with a number, dtype, key or the order of its header changed."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    key, other = rng.choice(list(header)), rng.choice(list(header))
    numbers = [0, 1, 2, 3, 7, -1, 1 << 31, 1 << 62, 1 << 70, 1.5, None]
    kind = rng.randrange(5)
    if kind == 0:
        header[key]["dtype"] = rng.choice(["F64", "F32", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "U16", "C64", "x"])
    elif kind == 1:
        header[key]["shape"] = [rng.choice(numbers[:4] * 3 + numbers) for _ in range(rng.randrange(5))]
    elif kind == 2:
        header[key]["data_offsets"][rng.randrange(2)] = rng.choice(numbers)
    elif kind == 3:
        header[key], header[other] = header[other], header[key]
    else:
        header[rng.choice([other, key + "0", "\x1b"])] = header.pop(key)
    text = json.dumps(header).encode()
    return (len(text) + rng.choice([0] * 9 + [1, -1])).to_bytes(8, "little") + text + content[8 + length :]


def tensors_in(content, name=""):
    if isinstance(content, torch.Tensor):
        yield name, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from tensors_in(value, f"{name}.{key}")


def held(content):
    """The tensors that torch or safetensors read, by name; None where they refuse the file."""
    try:
        if content[8:9] == b"{":
            return dict(tensors_in(safetensors.torch.load(content)))
        return dict(tensors_in(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)))
    except Exception:
        return None


def same(tensor, other):
    return tensor.shape == other.shape and torch.equal(tensor.double().nan_to_num(9), other.double().nan_to_num(9))


class Fuzzer:
    def __init__(self, path, seed):
        self.path, self.rng = path, random.Random(seed)
        model = randomize(ConvMixer(**SIZES))
        plain = randomize(plain_convmixer(**SIZES))
        self.state = model.state_dict()
        self.good = [
            saved(self.state),
            saved(training_content(model)),
            saved(plain.state_dict()),
            saved(training_content(model), _use_new_zipfile_serialization=False),
            safetensors.torch.save(self.state),
        ]
        self.weights = [self.load(content).state_dict() for content in self.good]
        self.outcomes = collections.Counter()

    def load(self, content):
        self.path.write_bytes(content)
        return load_checkpoint(self.path, ema=self.rng.choice([True, None]) if b"state_dict_ema" in content else None)

    def step(self):
        number = self.rng.randrange(len(self.good))
        content, weights = self.good[number], self.weights[number]
        is_zip = content.startswith(b"PK")
        protected = False
        kind = self.rng.randrange(3)
        if kind == 0 or (kind == 2 and number in (2, 3)):
            change = self.rng.choice(BYTES)
            changed, protected = change(content, self.rng), is_zip
        elif kind == 1 and is_zip:
            change = self.rng.choice(ZIPS)
            changed = zip_again(content, self.rng, change)
        elif kind == 1 and number == 4:
            change = change_header
            changed = change(content, self.rng)
        else:
            change, weights = change_state, self.weights[0]
            changed = saved(change(self.state, self.rng), _use_new_zipfile_serialization=self.rng.randrange(4) > 0)
        self.outcomes[self.judge(changed, weights, protected)] += 1

    def judge(self, changed, weights, protected):
        try:
            model = self.load(changed)
        except ValueError as error:
            assert str(error).isprintable() and str(self.path) in str(error)
            assert len(str(error)) <= len(str(self.path)) + 500
            assert not isinstance(error.__cause__, TimeoutError), "it takes too long"
            return "refused"
        tensors = model.state_dict()
        unchanged = tensors.keys() == weights.keys() and all(same(tensors[key], weights[key]) for key in weights)
        if unchanged:
            return "the same"
        assert not protected, "other weights in spite of checksums"
        content = held(changed)
        assert content is not None, "other weights, of a file that torch refuses"
        assert all(any(same(tensor, other) for other in content.values()) for tensor in tensors.values())
        model(torch.zeros(1, model.in_channels, model.patch_size, model.patch_size, dtype=model.head.weight.dtype))
        return "other weights, as torch reads them"


@pytest.fixture(autouse=True)
def one_thread():
    """Several would wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def limited_time():
    """Raises TimeoutError in the code within, also where that waits or loops in Python."""

    def raise_error(*_):
        raise TimeoutError(f"a file took {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, raise_error)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def run(path, seed, count):
    """What became of so many files; the first that goes wrong is left at that path."""
    fuzzer = Fuzzer(path, seed)
    with limited_memory():
        for number in range(count):
            try:
                with limited_time():
                    fuzzer.step()
            except BaseException:
                print(f"file {number} of seed {seed} is left as {path}")
                raise
    return fuzzer.outcomes


@pytest.mark.filterwarnings("ignore")
def test_some_changes(tmp_path):
    outcomes = run(tmp_path / "gelu.pt", seed=0, count=200)
    assert len(outcomes) == 3 and min(outcomes.values()) >= 10, outcomes  # each kind of outcome is there


@pytest.mark.fuzz
@pytest.mark.filterwarnings("ignore")
def test_fuzz(tmp_path):
    count, seed = fuzz_run(10_000)
    outcomes = run(tmp_path / "gelu.pt", seed, count)
    print(f"{count} files of seed {seed}: {dict(outcomes)}")


def each_byte_flipped(content):
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        yield place, bytes(flipped)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.fuzz), 101])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_no_flipped_bit_changes_the_weights_of_a_zip(number, every, tmp_path):
    """Wherever it is: in a tensor, the pickle, padding, the headers of entries, the directory or its records."""
    fuzzer = Fuzzer(tmp_path / "gelu.pt", seed=0)
    content = fuzzer.good[number]
    outcomes = collections.Counter()
    for place, flipped in each_byte_flipped(content):
        if place % every == 0 or (place > len(content) - 98 and place % 3 == 0):  # its records
            with limited_time():
                outcomes[fuzzer.judge(flipped, fuzzer.weights[number], protected=True)] += 1
    assert outcomes.keys() == {"refused", "the same"}, outcomes


@pytest.mark.fuzz
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", [3, 4])
def test_flipped_bits_without_checksums(number, tmp_path):
    fuzzer = Fuzzer(tmp_path / "gelu.pt", seed=0)
    outcomes = collections.Counter()
    for _, flipped in each_byte_flipped(fuzzer.good[number]):
        with limited_time():
            outcomes[fuzzer.judge(flipped, fuzzer.weights[number], protected=False)] += 1
    assert outcomes["refused"] and outcomes["other weights, as torch reads them"], outcomes
