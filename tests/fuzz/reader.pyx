# cython: language_level=3, boundscheck=False, wraparound=False
"""The frame reader as a session uses it: bytes are received where it says, and parsed in place.

Compiled by tests/fuzz/run.py: a call of Python for each step would cost ten times the step.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.object cimport PyObject
from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport malloc
from libc.string cimport memcpy, memset

from domi_fast._core cimport FrameReader, RawFrame

cdef extern from "Python.h":
    void Py_DECREF(PyObject*)

cdef extern from "sanitizer/asan_interface.h":
    void __asan_poison_memory_region(const void*, size_t)
    void __asan_unpoison_memory_region(const void*, size_t)
    void* __asan_region_is_poisoned(void*, size_t)
    void __asan_report_error(void*, void*, void*, void*, int, size_t)

cdef enum:
    CAPACITY = 131080           # of the engine's receive buffer
    FILLINGS = 3

cdef uint32_t[8] LIMITS = [8, 9, 24, 300, 4096, 16384, 40000, 0xFFFFFFFF]
cdef size_t[4] CUTS = [0, 1, 3, 12]
cdef uint8_t* shared = <uint8_t*>malloc(CAPACITY)
cdef uint8_t[16384] filling
memset(filling, 0, sizeof(filling))
if shared is NULL:
    raise MemoryError
__asan_poison_memory_region(shared, CAPACITY)


cdef class Pieces:
    """A stream, and how it is cut; see frames.py."""

    cdef:
        const uint8_t* data
        size_t size, cuts, begin, turn, filled

    cdef bint next(self, const uint8_t** piece, size_t* size) noexcept:
        cdef size_t cut, wanted
        if self.begin >= self.size:
            return False
        wanted = self.size - self.begin
        if self.cuts:
            cut = self.data[1 + self.turn]
            self.turn = (self.turn + 1) % self.cuts
            if cut >= 224 and self.filled < FILLINGS:
                self.filled += 1
                piece[0] = filling
                size[0] = (cut - 223) * 512
                return True
            wanted = min(wanted, 1 if cut >= 224 else cut + 1 if cut < 128 else (cut - 127) * 64)
        piece[0] = self.data + self.begin
        size[0] = wanted
        self.begin += wanted
        return True


cdef Pieces cut_up(bytes data):
    cdef Pieces pieces = Pieces.__new__(Pieces)
    pieces.data = <const uint8_t*>PyBytes_AS_STRING(data)
    pieces.size = PyBytes_GET_SIZE(data)
    pieces.cuts = CUTS[pieces.data[0] >> 4 & 3]
    pieces.begin = 1 + pieces.cuts
    return pieces


def split(bytes data):
    """The pieces, as a list of bytes."""
    cdef const uint8_t* piece
    cdef size_t size
    cdef list found = []
    cdef Pieces pieces = cut_up(data)
    while pieces.next(&piece, &size):
        found.append(PyBytes_FromStringAndSize(<const char*>piece, size))
    return found


def settings(bytes data):
    """The limit, and whether the stream begins with the magic."""
    return LIMITS[data[0] & 7], bool(data[0] & 8)


def run(bytes data, list seen=None):
    """Receive the pieces, and check that every byte is accounted for; the fault, or None.

    :param seen: if it is a list, it gets each frame: (channel, data, extend).
    """
    cdef uint8_t* where = NULL
    cdef const uint8_t* piece
    cdef size_t size, room, take, opened
    cdef long long left, held
    cdef bint magic = data[0] >> 3 & 1
    cdef Pieces pieces = cut_up(data)
    cdef FrameReader reader = FrameReader(LIMITS[data[0] & 7], magic=magic)
    left = -4 if magic else 0
    while pieces.next(&piece, &size):
        while size:
            # What has not been received is nobody's to read.
            opened = reader.tail_size
            __asan_unpoison_memory_region(shared, opened)
            reader.room(shared, CAPACITY, &where, &room)
            assert room > 0
            take = min(size, room)
            if shared <= where < shared + CAPACITY:
                opened += take
                __asan_unpoison_memory_region(shared, opened)
            memcpy(where, piece, take)
            piece += take
            size -= take
            left += take
            try:
                reader.received(shared, take)
                left -= parse(reader, seen)
            finally:
                __asan_poison_memory_region(shared, opened)
            if reader.fault is not NULL:
                assert reader.pending == 0
                return reader.fault.decode()
            held = <long long>reader.tail_size
            if reader.big is not NULL:
                held += 8 + <long long>reader.big_have
            # Until the magic is there, it is held like a frame.
            assert held == left or (magic and held == left + 4 < 4), (held, left)
    return None


cdef size_t parse(FrameReader reader, list seen) except? 0:
    """The bytes of the frames that are whole by now."""
    cdef RawFrame frame
    cdef size_t bytes_of_them = 0
    try:
        while reader.next(&frame):
            bytes_of_them += 8 + <size_t>frame.size + frame.extend_size
            assert 8 + <size_t>frame.size + frame.extend_size <= reader.limit
            touch(frame.data, frame.size)
            touch(frame.extend, frame.extend_size)
            if seen is not None:
                seen.append((
                    frame.channel,
                    PyBytes_FromStringAndSize(<const char*>frame.data, frame.size),
                    PyBytes_FromStringAndSize(<const char*>frame.extend, frame.extend_size)))
            if frame.owner is not NULL:
                assert PyBytes_GET_SIZE(<object>frame.owner) == frame.size
                Py_DECREF(frame.owner)
    finally:
        reader.close_window()
    return bytes_of_them


cdef void touch(const uint8_t* data, size_t size) noexcept:
    # What is poisoned among them ends the run, as a read of it would, which a compiler leaves out
    # when nobody asks for the result.
    cdef const char* bad = <const char*>__asan_region_is_poisoned(<void*>data, size) if size else NULL
    if bad is not NULL:
        __asan_report_error(NULL, NULL, NULL, <void*>bad, 0, 1)
