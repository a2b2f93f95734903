"""FlashInfer's two paged wrappers with plain torch inside: they check every argument as documented and then compute.

The API is that of docs.flashinfer.ai (`flashinfer.decode`, `flashinfer.prefill`), with the arguments that we use.
With `use_cuda_graph` the lengths are read from the caller's buffers, by tensor operations alone, so that `run` can be
recorded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _PagedWrapper:
    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD") -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert len(float_workspace_buffer) >= 1 << 20
        assert kv_layout == "HND", kv_layout
        self.device = float_workspace_buffer.device
        self.indptr = self.indices = self.last = torch.empty(0)
        self.shape: tuple[int, int, int, int] = (0, 0, 0, 0)
        self.options: dict[str, Any] = {}

    def check_plan(self, pages: tuple[Tensor, Tensor, Tensor], shape: tuple[int, int, int, int], options: Any) -> None:
        indptr, indices, last = pages
        assert all(each.dtype == torch.int32 and each.ndim == 1 for each in pages), pages
        assert indptr.device.type == last.device.type == "cpu", "plan would wait for the device"
        assert indices.device.type == self.device.type
        assert len(indptr) == len(last) + 1
        assert indptr[0] == 0
        assert (indptr.diff() >= 1).all(), "each request has a page"
        assert len(indices) == indptr[-1]
        num_heads, num_kv_heads, _, page_size = shape
        assert num_heads % num_kv_heads == 0
        assert ((last >= 1) & (last <= page_size)).all(), last
        assert options.keys() == {"sm_scale", "q_data_type", "kv_data_type"}, options
        self.shape, self.options = shape, options

    def check_run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], num_queries: int) -> None:
        num_heads, num_kv_heads, head_dim, page_size = self.shape
        keys, values = paged_kv_cache
        assert q.shape == (num_queries, num_heads, head_dim)
        assert q.is_contiguous()
        assert keys.shape == values.shape
        assert keys.shape[1:] == (num_kv_heads, page_size, head_dim)
        assert keys.stride() == values.stride()
        assert keys.stride(3) == 1
        assert q.dtype == self.options["q_data_type"]
        assert keys.dtype == self.options["kv_data_type"]

    def attend(self, q: Tensor, cache: tuple[Tensor, Tensor], request: Tensor, seen: Tensor, num_pages: int) -> Tensor:
        """`request` `[num_queries]`: whose pages; `seen` `[num_queries]`: how many of its tokens. Asks no host."""
        _, num_kv_heads, head_dim, page_size = self.shape
        page_idx = torch.arange(num_pages, device=q.device)
        is_page = page_idx < (self.indptr.diff()[request])[:, None]
        at = (self.indptr[:-1][request][:, None] + page_idx).clamp(max=len(self.indices) - 1)
        table = torch.where(is_page, self.indices[at.long()], self.indices[:1]).long()
        is_seen = (torch.arange(num_pages * page_size, device=q.device) < seen[:, None])[:, None, :]
        keys, values = (
            part[table].transpose(1, 2).reshape(len(q), num_kv_heads, -1, head_dim).float() for part in cache
        )
        keys, values = (each.masked_fill(~is_seen[..., None], 0) for each in (keys, values))
        grouped = q.float().view(len(q), num_kv_heads, -1, head_dim)
        scores = (grouped @ keys.transpose(2, 3) * self.options["sm_scale"]).masked_fill(~is_seen[:, :, None], -1e30)
        return (scores.softmax(-1) @ values).reshape(q.shape).to(q.dtype)


class BatchDecodeWithPagedKVCacheWrapper(_PagedWrapper):
    """One query per request."""

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        *,
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout)
        self.use_tensor_cores = use_tensor_cores
        self.is_graph = use_cuda_graph
        buffers = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
        if use_cuda_graph:
            indptr, indices, last = buffers
            assert indptr is not None and indices is not None and last is not None
            assert all(each.dtype == torch.int32 for each in (indptr, indices, last))
            assert len(indptr) == len(last) + 1
            self.indptr, self.indices, self.last = indptr, indices, last

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        **options: Any,
    ) -> None:
        self.check_plan((indptr, indices, last_page_len), (num_qo_heads, num_kv_heads, head_dim, page_size), options)
        if not self.use_tensor_cores:
            assert num_qo_heads // num_kv_heads in (1, 2, 4, 8), "no plain kernel for this group"
        if self.is_graph:
            if len(last_page_len) != len(self.last) or len(indices) > len(self.indices):
                raise ValueError("the batch size is fixed, and indices must fit the buffer, in cudagraph mode")
            self.indptr.copy_(indptr)
            self.indices[: len(indices)].copy_(indices)
            self.last.copy_(last_page_len)
        else:
            self.indptr, self.indices, self.last = indptr.to(self.device), indices, last_page_len.to(self.device)

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        num_requests = len(self.last)
        self.check_run(q, paged_kv_cache, num_requests)
        lengths = (self.indptr.diff() - 1) * self.shape[3] + self.last
        num_pages = len(self.indices) // (num_requests if self.is_graph else 1)
        return self.attend(q, paged_kv_cache, torch.arange(num_requests), lengths, num_pages)


class BatchPrefillWithPagedKVCacheWrapper(_PagedWrapper):
    """Any number of queries per request; the last sees all of its tokens."""

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        **options: Any,
    ) -> None:
        assert causal
        assert qo_indptr.dtype == torch.int32
        assert len(qo_indptr) == len(paged_kv_indptr)
        assert (qo_indptr.diff() >= 1).all()
        pages = (paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        self.check_plan(pages, (num_qo_heads, num_kv_heads, head_dim_qk, page_size), options)
        self.indptr, self.indices, self.last = paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        self.qo_indptr = qo_indptr

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        self.check_run(q, paged_kv_cache, int(self.qo_indptr[-1]))
        counts = self.qo_indptr.diff()
        request = torch.arange(len(counts)).repeat_interleave(counts)
        lengths = (self.indptr.diff() - 1) * self.shape[3] + self.last
        behind = self.qo_indptr[1:][request] - 1 - torch.arange(len(q))  # queries that come after this one
        return self.attend(q, paged_kv_cache, request, lengths[request] - behind, int(self.indptr.diff().max()))
