"""Fused layouts against their naive twin: every version, pooling and form, forward and backward, arrays and tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import naive_ops
from trilith.errors import InvalidRequestError
from trilith.nn.layouts import layouts_by_kernel, layouts_by_torch
from trilith.ops.combiners import combiner_of
from trilith.ops.layout import (
    FidOffsets,
    flatten_layout,
    fused_embedding_to_layout,
    fused_embedding_to_layout_grad,
    nest_layout,
)
from trilith.ops.layout_config import FeatureConfig, FeatureConfigs, OutConfig, OutType, SliceConfig

SHARED = 1 << 31


def make_configs(one_dim=False):
    """Five features of two tables; every pooling, every form."""

    def feature(table, combiner="sum", dims=(1, 2, 18)):
        dims = (1, 2, 2) if one_dim else dims
        return FeatureConfig(table=table, slice_dims=dims, combiner=combiner_of(combiner))

    features = {
        "a": feature("t1"),
        "b": feature("t1", "mean", dims=(1, 2)),
        "c": feature("t2", "first(2)", dims=(3,)),
        "d": feature("t1", "sqrtn"),
        "e": feature("t2", "first(2)", dims=(4,)),
    }

    def slices(*given):
        return tuple(SliceConfig(*each) for each in given)

    layouts = {
        "all": OutConfig(slices=slices(("a", 0, 5), ("d", 0, 5), ("b", 1, 3)), out_type=OutType.CONCAT),
        "bias": OutConfig(slices=slices(("d", 0, 1), ("a", 0, 1), ("b", 0, 1)), out_type=OutType.ADDN),
        "each": OutConfig(slices=slices(("b", 0, 3), ("c", 0, 3)), out_type=OutType.NONE),
        "pair": OutConfig(slices=slices(("b", 1, 3), ("a", 1, 3)), out_type=OutType.STACK),
        "rows": OutConfig(slices=slices(("c", 0, 2), ("e", 1, 4)), out_type=OutType.CONCAT),
        "seqs": OutConfig(slices=slices(("e", 0, 2), ("c", 1, 3)), out_type=OutType.STACK),
    }
    return FeatureConfigs(features, layouts)


def arrange(configs, rows_of, version, shards, rng):
    """Buffers and offsets of a batch in a version's encoding, and each id's vector."""
    batch = max(map(len, rows_of.values()))
    tables = configs.features_by_table
    vectors = {
        (name, each): rng.normal(size=configs.features[name].dim).astype(np.float32)
        for name, rows in rows_of.items()
        for ids in rows
        for each in ids
    }
    blocks, splits, code = [], [], {}
    lists_before = 0
    for t, names in enumerate(tables.values()):
        for s in range(shards):
            block, counts, floats = [], [0], 0
            for fi, name in enumerate(names):
                own = [
                    each for each in dict.fromkeys(each for ids in rows_of[name] for each in ids) if each % shards == s
                ]
                for pos, each in enumerate(own):
                    number = t * shards + s if version != 2 else lists_before + s * len(names) + fi
                    place = {1: len(block), 2: pos}.get(version, floats)
                    code[name, each] = number << 32 | place
                    block.append(vectors[name, each])
                    floats += configs.features[name].dim
                counts.append(len(block))
            blocks.append(block)
            splits.append(counts)
        lists_before += len(names) * shards
    fids, starts, firsts = [], [0], []
    for name in configs.feature_names:
        rows = rows_of[name]
        firsts.append(len(starts) - 1 | (SHARED if len(rows) == 1 and batch > 1 else 0))
        for ids in rows:
            fids += [code[name, each] for each in ids]
            starts.append(len(fids))
    firsts.append(len(starts))
    more = {"row_splits": splits} if version == 2 else {}
    flat = [np.concatenate([np.empty(0, np.float32), *block]) for block in blocks]
    if version == 1:
        dims = [configs.features[names[0]].dim for names in tables.values() for _ in range(shards)]
        flat = [each.reshape(-1, dim) for each, dim in zip(flat, dims, strict=True)]
    if version == 4:
        by_shard = [flat[t * shards + s] for s in range(shards) for t in range(len(tables))]
        more["emb_row_lengths"] = [each.size for each in by_shard]
        flat = [np.concatenate(by_shard)]
    offsets = FidOffsets(
        version=version,
        ps_num=shards,
        fid_offset=np.array(fids, np.uint64),
        feature_offset=np.array(starts, np.int32),
        nfl_offset=np.array(firsts, np.uint32),
        batch_size=np.array([batch]),
        **more,
    )
    return flat, offsets, vectors


def draw(configs, rng, batch):
    rows_of = {
        name: [rng.integers(0, 9, rng.integers(0, 5)).tolist() for _ in range(batch)] for name in configs.features
    }
    for name in ("a", "c"):
        if rng.integers(0, 2):
            rows_of[name] = rows_of[name][:1]  # shared
    return rows_of


@pytest.mark.parametrize("torch_layout", [layouts_by_kernel, layouts_by_torch])
@pytest.mark.parametrize("version", [1, 2, 3, 4, 5])
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), batch=st.integers(1, 5), shards=st.integers(1, 3), threads=st.integers(1, 3))
def test_layouts_and_their_gradients_match_naive(version, torch_layout, seed, batch, shards, threads):
    rng = np.random.default_rng(seed)
    configs = make_configs(one_dim=version == 1)
    rows_of = draw(configs, rng, batch)
    buffers, offsets, vectors = arrange(configs, rows_of, version, shards, rng)
    want = naive_ops.layout_values(configs, rows_of, lambda name, each: vectors[name, each])
    got = fused_embedding_to_layout(buffers, offsets, configs, threads=threads)
    leaves = [torch.from_numpy(each.copy()).requires_grad_() for each in buffers]
    ours = torch_layout(leaves, offsets, configs)
    assert len(got) == len(ours) == len(want)
    for each, tensor, reference in zip(got, ours, want, strict=True):
        np.testing.assert_allclose(each, reference, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(tensor.detach(), reference, rtol=1e-4, atol=1e-5)
    # The layouts are linear in the vectors, so the gradient is the adjoint.
    grads = [rng.normal(size=each.shape).astype(np.float32) for each in want]
    back = fused_embedding_to_layout_grad(grads, buffers, offsets, configs, scale=0.5, threads=threads)
    torch.autograd.backward(ours, [torch.from_numpy(each) for each in grads])
    left = sum(float((each * grad).sum()) for each, grad in zip(want, grads, strict=True))
    right = sum(float((each * grad).sum()) for each, grad in zip(buffers, back, strict=True))
    assert abs(left / 2 - right) <= 1e-3 * (1 + abs(left))
    for each, tensor in zip(back, leaves, strict=True):
        np.testing.assert_allclose(tensor.grad / 2, each, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("torch_layout", [layouts_by_kernel, layouts_by_torch])
def test_requests_glued_together_give_their_rows_one_after_another(torch_layout):
    rng = np.random.default_rng(3)
    configs = make_configs()
    cases = [arrange(configs, draw(configs, rng, batch), 5, 2, rng) for batch in (3, 2)]
    glued = FidOffsets(
        version=5,
        ps_num=2,
        **{
            name: np.concatenate([getattr(offsets, name) for _, offsets, _ in cases])
            for name in ("fid_offset", "feature_offset", "nfl_offset", "batch_size")
        },
        fid_size=[offsets.fid_offset.size for _, offsets, _ in cases],
        feature_size=[offsets.feature_offset.size for _, offsets, _ in cases],
        nfl_size=[offsets.nfl_offset.size for _, offsets, _ in cases],
        emb_size=np.concatenate([[each.size for each in buffers] for buffers, _, _ in cases]),
    )
    buffers = [np.concatenate(pair) for pair in zip(cases[0][0], cases[1][0], strict=True)]
    singles = [fused_embedding_to_layout(buffers_, offsets, configs) for buffers_, offsets, _ in cases]
    want = [np.concatenate(pair) for pair in zip(*singles, strict=True)]
    for got, reference in zip(fused_embedding_to_layout(buffers, glued, configs), want, strict=True):
        np.testing.assert_array_equal(got, reference)
    tensors = torch_layout([torch.from_numpy(each) for each in buffers], glued, configs)
    for got, reference in zip(tensors, want, strict=True):
        np.testing.assert_allclose(got, reference, rtol=1e-5, atol=1e-5)
    back = fused_embedding_to_layout_grad(want, buffers, glued, configs)
    halves = [
        fused_embedding_to_layout_grad(single, buffers_, offsets, configs)
        for single, (buffers_, offsets, _) in zip(singles, cases, strict=True)
    ]
    for got, pair in zip(back, zip(*halves, strict=True), strict=True):
        np.testing.assert_array_equal(got, np.concatenate(pair))


def test_layouts_nest_by_name_and_flatten_again():
    configs = make_configs()
    tensors = [np.full(1, i, np.float32) for i in range(7)]
    nested = nest_layout(tensors, configs)
    assert list(nested) == ["all", "bias", "each", "pair", "rows", "seqs"]
    assert [each[0] for each in nested["each"]] == [2, 3]
    assert [each[0] for each in flatten_layout(nested)] == list(range(7))
    with pytest.raises(InvalidRequestError):
        nest_layout([*tensors, tensors[0]], configs)


def changed(offsets, **fields):
    return FidOffsets(**{name: getattr(offsets, name) for name in FidOffsets.__slots__} | fields)


@pytest.mark.parametrize("torch_layout", [layouts_by_kernel, layouts_by_torch])
def test_offsets_that_point_nowhere_are_refused(torch_layout):
    rng = np.random.default_rng(1)
    configs = make_configs()
    rows_of = {name: [[1, 2], [3]] for name in configs.features}
    buffers, offsets, _ = arrange(configs, rows_of, 3, 2, rng)
    fids = offsets.fid_offset
    broken = {
        "list": changed(offsets, fid_offset=np.append(np.uint64(99 << 32), fids[1:])),
        "position": changed(offsets, fid_offset=np.append(fids[:1] | np.uint64(0xFFFFFF), fids[1:])),
        "rows that fall": changed(offsets, feature_offset=offsets.feature_offset[::-1]),
        "rows past the end": changed(offsets, feature_offset=offsets.feature_offset + 1),
        "too few rows": changed(offsets, batch_size=np.array([3])),
        "too few features": changed(offsets, nfl_offset=offsets.nfl_offset[1:]),
        "a first row outside": changed(offsets, nfl_offset=offsets.nfl_offset + np.uint32(5)),
    }
    tensors = [torch.from_numpy(each) for each in buffers]
    for wrong in broken.values():
        with pytest.raises(InvalidRequestError):
            fused_embedding_to_layout(buffers, wrong, configs)
        with pytest.raises(InvalidRequestError):
            torch_layout(tensors, wrong, configs)
    with pytest.raises(InvalidRequestError, match="buffers"):
        fused_embedding_to_layout(buffers[1:], offsets, configs)
    grads = fused_embedding_to_layout(buffers, offsets, configs)
    with pytest.raises(InvalidRequestError):
        fused_embedding_to_layout_grad(grads, buffers, broken["list"], configs)
    with pytest.raises(InvalidRequestError, match="gradients"):
        fused_embedding_to_layout_grad(grads[1:], buffers, offsets, configs)


@pytest.mark.parametrize(
    ("slices", "kind", "message"),
    [
        ((("c", 0, 2), ("a", 0, 2)), OutType.ADDN, "cannot be added"),
        ((("a", 0, 2), ("b", 0, 3)), OutType.STACK, "do not fit"),
        ((("a", 0, 2), ("c", 0, 2)), OutType.CONCAT, "do not fit"),
        ((("a", 2, 2),), OutType.CONCAT, "not within"),
        ((("a", 0, 22),), OutType.CONCAT, "not within"),
        ((("z", 0, 1),), OutType.CONCAT, "no feature 'z'"),
        ((), OutType.CONCAT, "no slices"),
    ],
)
def test_layouts_that_cannot_be_are_refused(slices, kind, message):
    layout = OutConfig(slices=tuple(SliceConfig(*each) for each in slices), out_type=kind)
    with pytest.raises(InvalidRequestError, match=message):
        FeatureConfigs(make_configs().features, {"x": layout})
