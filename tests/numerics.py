"""Accuracy is judged against float64: our error may not exceed the peer's on the same input."""

import torch


def max_error(values, exact):
    """The largest distance of a tensor from its exact values, computed in float64."""
    return _errors(values, exact).max().item()


def _errors(values, exact):
    assert exact.dtype == torch.float64
    assert values.shape == exact.shape
    # Equal infinities are no error; NaN stays one, and fails every comparison.
    return torch.where(values.double() == exact, 0.0, (values.double() - exact).abs())


def assert_error_at_most_peer(ours, peer, exact, what):
    """ours and peer, of one dtype, approximate exact (float64); prints both errors and asserts that ours is not larger.

    Two ways to add the same numbers differ by luck in their worst element. So a maximum up to twice the peer's passes,
    too, if the root mean square error is not larger: by more than two standard errors of the difference, that is, since
    the peer's own changes with its number of threads; 2 / sqrt(n) of n values, and never more than a tenth. float64
    results are their own yardstick: there the distance may be what rounding a sum explains, 64 units in the last place
    of the largest value.
    """
    assert ours.dtype == peer.dtype, f"{what}: ours is {ours.dtype}, the peer's {peer.dtype}"
    if exact.numel() == 0:
        assert ours.shape == exact.shape, f"{what}: ours is {tuple(ours.shape)}, not {tuple(exact.shape)}"
        return
    our_errors, peer_errors = _errors(ours, exact), _errors(peer, exact)
    our_max, peer_max = our_errors.max().item(), peer_errors.max().item()
    our_rms, peer_rms = (errors.square().mean().sqrt().item() for errors in (our_errors, peer_errors))
    report = (
        f"{what}: max |error| against float64: ours {our_max:.3g}, peer {peer_max:.3g}; "
        f"root mean square: ours {our_rms:.3g}, peer {peer_rms:.3g}"
    )
    print(report)
    unit = torch.finfo(ours.dtype).eps * exact.abs().max().item()
    if ours.dtype == torch.float64:
        assert our_max <= 64 * unit, report
    else:
        luck = min(0.1, 2 / exact.numel() ** 0.5)
        assert our_max <= max(peer_max, unit) or (our_rms <= (1 + luck) * peer_rms and our_max <= 2 * peer_max), report


def assert_one_of_two_nearest(values, exact, in_tail):
    """values are exact (float64) within half a unit in the last place, or within in_tail where that is more, before
    they were rounded to their dtype."""
    limits = torch.finfo(values.dtype)
    half_unit = exact.abs().clamp_min(limits.smallest_normal).log2().floor().exp2() * limits.eps / 2
    assert (_errors(values, exact) <= half_unit + half_unit.clamp_min(in_tail)).all()
