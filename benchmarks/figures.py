"""The figures of paper.py: each function writes a PNG from records, and tells whether there was anything in them."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter
from matplotlib.transforms import Bbox

OURS = "fused"
OURS_COLOUR = "#d1495b"
FAMILIES = {
    "ConvMixer": OURS_COLOUR,
    "ResNet": "#3d6fb6",
    "DeiT": "#2f8f6b",
    "ResMLP": "#8a63b0",
    "Swin": "#c98a1b",
    "ViT": "#5b6770",
    "Mixer": "#17a2b8",
}
BACKEND_COLOURS = ["#3d6fb6", "#2f8f6b", "#c98a1b", "#8a63b0", "#5b6770", "#17a2b8"]
AREA = 5.0  # of a circle, in square points a million parameters
DPI = 150


def accuracy_paper(path: Path, tables: list[dict]) -> bool:
    """Figure 1: the paper's top-1 against its throughput."""
    points = [_point(line, float(line["paper"]["rtx8000_images_per_second"] or 0)) for line in tables]
    title = "The paper: ImageNet accuracy against throughput on an RTX 8000 (fp16, batches of 64)"
    return _accuracy(path, [point for point in points if point], title)


def accuracy_machine(path: Path, tables: list[dict], device: str) -> bool:
    """Figure 1 with the throughput of this machine: ours for ConvMixers, a ring at the best other backend; for the
    others the best backend."""
    points = []
    for line in tables:
        others = [rate for backend, rate in line["rates"].items() if rate and backend != OURS]
        ours = line["rates"].get(OURS)
        point = _point(line, ours or max(others, default=0))
        if point:
            points.append(point | dict(other=max(others) if ours and others else None))
    return _accuracy(path, points, f"This machine: the paper's accuracy against throughput on {device}")


def _point(line: dict, throughput: float) -> dict | None:
    paper = line["paper"]
    accuracy = paper["top1_a1_percent"] or paper["top1_percent"]
    if not accuracy or not throughput:
        return None
    network = paper["network"]
    family = next(family for family in FAMILIES if network.startswith(family))
    if family == "ConvMixer":
        *_, kernel, patch = line["model"].split("_")
        network = f"{network.removeprefix('ConvMixer-')} {kernel} {patch}"
    millions = line["parameters"] / 1e6 if line["parameters"] else float(paper["params_millions"])
    return dict(x=throughput, y=float(accuracy), millions=millions, family=family, label=network)


def _accuracy(path: Path, points: list[dict], title: str) -> bool:
    if not points:
        return False
    figure, axes = plt.subplots(figsize=(10, 6.6))
    figure.subplots_adjust(left=0.07, right=0.96, top=0.93, bottom=0.22)
    for point in points:
        colour = FAMILIES[point["family"]]
        size = AREA * point["millions"]
        axes.scatter(point["x"], point["y"], size, color=colour, alpha=0.75, linewidths=0, zorder=2)
        if point.get("other"):
            axes.plot([point["other"], point["x"]], [point["y"]] * 2, color=colour, linewidth=1, zorder=1)
            axes.scatter(point["other"], point["y"], size, facecolors="white", edgecolors=colour, zorder=2)
    axes.set_xscale("log")
    extent = [x for point in points for x in (point["x"], point.get("other")) if x]
    axes.set_xlim(min(extent) / 1.25, max(extent) * 1.35)
    _plain_log_ticks(axes.xaxis, axes.get_xlim())
    low, high = min(point["y"] for point in points), max(point["y"] for point in points)
    axes.set_ylim(low - 1, high + 1)
    axes.set_xlabel("images per second (logarithmic)")
    axes.set_ylabel("ImageNet top-1, % (paper)")
    axes.set_title(title, fontsize=11)
    _plain(axes)
    _label(axes, points)
    families = [family for family in FAMILIES if any(point["family"] == family for point in points)]
    handles = [_disc(FAMILIES[family], 7, family) for family in families]
    if any(point.get("other") for point in points):
        ring = dict(color="none", marker="o", markeredgecolor=OURS_COLOUR, markersize=7)
        handles.append(Line2D([], [], **ring, label="ConvMixer, best other backend"))
    handles += [_disc("#bbbbbb", math.sqrt(AREA * millions), f"{millions} M") for millions in (5, 25, 100)]
    figure.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 0.03), ncols=6, frameon=False, fontsize=9)
    note = "ConvMixer-width/depth, kernel k, patch p; of two accuracies in the paper, the one with A1 regularisation"
    figure.text(0.5, 0.005, note, ha="center", va="bottom", fontsize=7.5, color="#666666")
    return _save(figure, path)


def _disc(colour: str, size: float, label: str) -> Line2D:
    style = dict(color="none", marker="o", markerfacecolor=colour, markeredgewidth=0)
    return Line2D([], [], **style, markersize=size, label=label)


def _label(axes: Axes, points: list[dict]) -> None:
    """Writes each point's label where it covers no circle, no other label and no border, as near as it finds; with a
    line to it where that is not beside it."""
    axes.figure.canvas.draw()
    pixel = axes.figure.dpi / 72
    taken = []
    for point in points:
        for x in filter(None, (point["x"], point.get("other"))):
            centre, radius = axes.transData.transform((x, point["y"])), math.sqrt(AREA * point["millions"]) / 2 * pixel
            taken.append(Bbox([centre - radius, centre + radius]))
        if point.get("other"):  # the line between the two
            ends = axes.transData.transform([(x, point["y"]) for x in sorted((point["x"], point["other"]))])
            taken.append(Bbox(ends + [(0, -pixel), (0, pixel)]))
    inside = axes.get_window_extent()
    for point in sorted(points, key=lambda point: -point["y"]):
        centre, radius = axes.transData.transform((point["x"], point["y"])), math.sqrt(AREA * point["millions"]) / 2
        place = dict(xytext=(0, 0), textcoords="offset points", ha="center", va="center", zorder=4)
        colour = FAMILIES[point["family"]]
        text = axes.annotate(point["label"], (point["x"], point["y"]), fontsize=8, color=colour, **place)
        box = text.get_window_extent()
        half = box.width / 2 / pixel, box.height / 2 / pixel
        best, fewest = (0, 0), math.inf
        for far in (2, 6, 12, 20, 30, 42, 56):
            for turn in (90, 270, 0, 180, 45, 135, 315, 225, 68, 112, 248, 292):
                cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
                offset = cos * (radius + far + half[0]), sin * (radius + far + half[1])
                here = centre + (offset[0] * pixel, offset[1] * pixel)
                wanted = Bbox([here - (half[0] * pixel, half[1] * pixel), here + (half[0] * pixel, half[1] * pixel)])
                beyond = Bbox.union([inside, wanted]).bounds != inside.bounds
                overlaps = wanted.count_overlaps(taken) + 9 * beyond
                if overlaps < fewest:
                    best, fewest, area, distance = offset, overlaps, wanted, far
            if fewest == 0:
                break
        text.set_position(best)
        taken.append(area)
        if distance > 6:
            line = dict(arrowstyle="-", color="#999999", linewidth=0.6, shrinkA=half[1], shrinkB=radius)
            axes.annotate("", (point["x"], point["y"]), best, textcoords="offset points", zorder=1, arrowprops=line)


def kernel_size(path: Path, records: list[dict], model: str, tables: list[dict]) -> bool:
    """Throughput against kernel size, and relative to the smallest kernel's beside the paper's."""
    series = _series(records)
    if not series:
        return False
    figure, (absolute, relative) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    sizes = [line["x"] for line in records]
    smallest = min(sizes)
    for backend, (points, style) in series.items():
        absolute.plot(*zip(*points.items()), label=backend, **style)
        if smallest in points:
            relative.plot(list(points), [100 * rate / points[smallest] for rate in points.values()], **style)
    paper = {line["model"]: float(line["paper"]["rtx8000_images_per_second"] or 0) for line in tables}
    small, large = (paper[f"convmixer_1536_20_k{k}_p7"] for k in (3, 9))
    marks = dict(color="black", linestyle=":", linewidth=1, marker="D", markersize=5)
    relative.plot([3, 9], [100, 100 * large / small], label="paper: ConvMixer-1536/20, RTX 8000", **marks)
    for axes, label in ((absolute, "images per second"), (relative, f"throughput, % of that with kernel {smallest}")):
        axes.set_xticks(sizes)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("kernel size")
        axes.set_ylabel(label)
        _plain(axes)
    figure.suptitle(f"What a large kernel costs: {model} with other kernel sizes", fontsize=11)
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    return _save(figure, path)


def resolution(path: Path, records: list[dict], model: str, batch: int) -> bool:
    """Milliseconds an image against its side, both logarithmic."""
    series = _series(records)
    if not series:
        return False
    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    for backend, (points, style) in series.items():
        axes.plot(list(points), [1e3 / rate for rate in points.values()], label=backend, **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    sizes = [line["x"] for line in records]
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", length=0)
    _plain_log_ticks(axes.yaxis, axes.get_ylim())
    axes.set_xlabel("side of the image, pixels (logarithmic)")
    axes.set_ylabel("milliseconds an image (logarithmic)")
    axes.set_title(f"Time against resolution: {model}, batches of {batch}", fontsize=11)
    _plain(axes)
    axes.legend(frameon=False, fontsize=9)
    return _save(figure, path)


def _series(records: list[dict]) -> dict[str, tuple[dict[int, float], dict]]:
    """For each backend with a figure its throughput by x, and how its line looks; ours last, so that it lies on top."""
    backends = list(dict.fromkeys(backend for line in records for backend in line["rates"]))
    backends.sort(key=lambda backend: backend == OURS)
    series = {}
    for backend, colour in zip(backends, BACKEND_COLOURS * len(backends)):
        points = {line["x"]: line["rates"][backend] for line in records if line["rates"].get(backend)}
        ours = backend == OURS
        style = dict(color=OURS_COLOUR if ours else colour, marker="o", markersize=5, linewidth=2.2 if ours else 1.5)
        if points:
            series[backend] = points, style
    return series


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#eeeeee")
    axes.set_axisbelow(True)


def _plain_log_ticks(axis: matplotlib.axis.Axis, limits: tuple[float, float]) -> None:
    """Ticks at 1, 2 and 5 times the powers of ten, as plain numbers."""
    low, high = limits
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    axis.set_ticks([step * 10**power for power in powers for step in (1, 2, 5) if low <= step * 10**power <= high])
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _save(figure: Figure, path: Path) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return True
