# cython: language_level=3, embedsignature=True
"""The compiled core of domi_fast. Its map, with every field explained, is ``_core.pxd``.

A table of contents: each part opens with its purpose, its invariants and the thread that owns it.
One module, because calls inside a module inline and calls between modules do not.
"""

import asyncio
import concurrent.futures
import inspect
import logging
import os
import ssl
import sys
import threading
import warnings
import weakref
from asyncio import CancelledError, InvalidStateError
from collections import Counter, deque

cimport cython
from cpython.buffer cimport (
    Py_buffer,
    PyBUF_READ,
    PyBUF_SIMPLE,
    PyBUF_WRITE,
    PyBuffer_FillInfo,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_GET_SIZE
from cpython.memoryview cimport PyMemoryView_FromMemory
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF, Py_XDECREF, Py_XINCREF
from libc.errno cimport EAGAIN, EINTR, EPROTO, errno
from libc.math cimport INFINITY, NAN, M_SQRT1_2, erfc, exp, log as c_log, log10, sqrt
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memmove, memset

if sys.maxsize <= 2**32:
    raise ImportError("domi_fast needs a 64-bit Python: its counters and ids are 64 bits wide")

include "_core_parts/constants.pxi"
include "_core_parts/python.pxi"
include "_core_parts/frame.pxi"
include "_core_parts/write_queue.pxi"
include "_core_parts/wheel.pxi"
include "_core_parts/engine.pxi"
include "_core_parts/driver.pxi"
include "_core_parts/tls.pxi"
include "_core_parts/session.pxi"
include "_core_parts/lanes.pxi"
include "_core_parts/heartbeat.pxi"
include "_core_parts/backlog.pxi"
include "_core_parts/linger.pxi"
include "_core_parts/ring.pxi"
include "_core_parts/dispatch.pxi"
include "_core_parts/status.pxi"
include "_core_parts/routes.pxi"
include "_core_parts/balance.pxi"
include "_core_parts/breaker.pxi"
include "_core_parts/verbs.pxi"
include "_core_parts/handlers.pxi"
include "_core_parts/delivery.pxi"
include "_core_parts/publish.pxi"
include "_core_parts/requests.pxi"
include "_core_parts/router.pxi"
include "_core_parts/control.pxi"
include "_core_parts/batch.pxi"
include "_core_parts/relay.pxi"
include "_core_parts/serial.pxi"
include "_core_parts/serial_thread.pxi"
