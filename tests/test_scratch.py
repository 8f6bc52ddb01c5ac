"""Memory that is used again: by the same thread, for the same dtype, and by nobody else."""

import threading

import torch

from modeling_deepseek.scratch import scratch


def test_the_next_call_gets_the_same_memory():
    first = scratch((3, 50), torch.float32)
    assert first.shape == (3, 50) and first.dtype == torch.float32 and first.is_contiguous()
    assert scratch((10, 2), torch.float32).data_ptr() == first.data_ptr()


def test_a_larger_one_replaces_it_and_leaves_what_others_hold():
    found = []

    def in_a_new_thread():  # which holds none yet
        found.append(scratch((4,), torch.int16).fill_(7))
        scratch((100,), torch.int16).fill_(1)

    thread = threading.Thread(target=in_a_new_thread)
    thread.start()
    thread.join()
    assert found[0].tolist() == [7, 7, 7, 7]


def test_dtypes_and_threads_have_their_own():
    own, found = scratch((8,), torch.float32), []
    thread = threading.Thread(target=lambda: found.append(scratch((8,), torch.float32)))
    thread.start()
    thread.join()
    pointers = {own.data_ptr(), found[0].data_ptr(), scratch((8,), torch.bfloat16).data_ptr()}
    assert len(pointers) == 3


def test_what_inference_mode_made_can_be_written_outside_of_it():
    with torch.inference_mode():
        scratch((300_000,), torch.float64)
    scratch((300_000,), torch.float64).add_(1)
