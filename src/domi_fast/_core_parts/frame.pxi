# Bytes to frames and back, without I/O.
#
# A frame: u32 length (of all of it), u16 extend size, u16 channel, data, extend; little-endian.
#
# Invariants: memory grows only with bytes that have arrived (at most twice as much, or as much as a
# frame before that arrived whole); a length is checked before it is used; a window never outlives
# the call that parses it, because close_window() moves what is left into `tail`. Owned by the loop
# thread.

class Frame(tuple):
    """A frame: ``(channel, data, extend)``.

    :ivar channel: 0-65535.
    :ivar data: bytes.
    :ivar extend: bytes: what the verbs append (a reply address, the rest of a pipeline).
    """

    __slots__ = ()

    def __new__(cls, channel, data, extend=b""):
        return tuple.__new__(cls, (channel, data, extend))

    def __getnewargs__(self):
        return tuple(self)

    @property
    def channel(self):
        return self[0]

    @property
    def data(self):
        return self[1]

    @property
    def extend(self):
        return self[2]

    def __repr__(self):
        return f"Frame(channel={self[0]}, data={self[1]!r}, extend={self[2]!r})"


cdef inline bytes frame_data(RawFrame* frame):
    if frame.owner is not NULL:
        return <bytes>frame.owner
    return PyBytes_FromStringAndSize(<char*>frame.data, frame.size)


cdef inline object new_frame(int channel, bytes data, bytes extend):
    # Frame(), without a call.
    return new_tuple(Frame, ((channel, data, extend),))


cdef object frame_object(RawFrame* frame):
    return new_frame(frame.channel, frame_data(frame),
                     PyBytes_FromStringAndSize(<char*>frame.extend, frame.extend_size))


cdef inline void write_header(uint8_t* p, uint32_t length, uint16_t extend_size,
                              uint16_t channel) noexcept:
    store32(p, length)
    store16(p + 4, extend_size)
    store16(p + 6, channel)


def encode_frame(channel, data, extend=b""):
    """The bytes of one frame.

    :param channel: 0-65535.
    :param data: bytes-like.
    :param extend: bytes-like, at most 65,535 bytes.
    :raises FrameError: the channel or a size does not fit the header.
    :raises BufferError: ``data`` or ``extend`` does not lie in one piece.
    """
    cdef Py_buffer body, tail
    if not 0 <= channel < MAX_CHANNELS:
        raise errors.FrameError(f"channel {channel}: a channel is 0-65535")
    cdef Py_ssize_t number = channel
    get_view(data, &body)
    try:
        get_view(extend, &tail)
        try:
            return frame_of(<uint16_t>number, &body, &tail)
        finally:
            PyBuffer_Release(&tail)
    finally:
        PyBuffer_Release(&body)


cdef bytes frame_of(uint16_t channel, Py_buffer* data, Py_buffer* extend):
    cdef size_t length
    if extend.len > 0xFFFF:
        raise errors.FrameError(
            f"an extend of {extend.len} bytes: the header has room for 65535", channel=channel,
            limit=0xFFFF)
    if <size_t>data.len > <size_t>0xFFFFFFFF - HEADER - <size_t>extend.len:
        raise errors.FrameError(
            f"a frame of {data.len} bytes: the header has room for 4294967295", channel=channel,
            limit=0xFFFFFFFF)
    length = HEADER + <size_t>data.len + <size_t>extend.len
    cdef bytes out = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>length)
    cdef uint8_t* p = <uint8_t*>PyBytes_AS_STRING(out)
    write_header(p, <uint32_t>length, <uint16_t>extend.len, channel)
    copy(p + HEADER, data.buf, <size_t>data.len)
    copy(p + HEADER + data.len, extend.buf, <size_t>extend.len)
    return out


@cython.final
cdef class FrameReader:
    """Turns a stream of bytes into frames. Pure: it never touches a socket.

    :param limit: the largest frame in bytes, header included.
    :param magic: whether the stream begins with the dialler's ``u32 2299``.
    """

    def __cinit__(self, limit=16 * 1024 * 1024, *, magic=False):
        if not HEADER <= limit <= 0xFFFFFFFF:
            raise ValueError(f"limit {limit}: a frame has 8 to 4294967295 bytes")
        self.limit = limit
        self.wants_magic = magic

    def __dealloc__(self):
        self.drop()

    @property
    def pending(self):
        """Bytes held of frames that are not complete."""
        return self.tail_size + (0 if self.big is NULL else HEADER + self.big_have)

    def feed(self, data):
        """The frames that ``data`` completes, as a list of :class:`Frame`.

        :raises FrameError: the bytes are not frames; the reader is of no use from then on.
        """
        cdef const uint8_t[::1] view = memoryview(data).cast("B") if len(data) else None
        cdef RawFrame frame
        cdef uint8_t* joined = NULL
        cdef size_t held = self.tail_size
        cdef size_t size
        cdef list frames = []
        if self.fault is not NULL:
            raise errors.FrameError(self.fault.decode(), limit=self.limit)
        if view is None:
            return frames
        size = <size_t>view.shape[0]
        try:
            if held:
                joined = <uint8_t*>malloc(held + size)
                if joined is NULL:
                    raise MemoryError
                copy(joined, self.tail, held)
                copy(joined + held, &view[0], size)
                self.open_window(joined, held + size)
            else:
                self.open_window(&view[0], size)
            try:
                while self.next(&frame):
                    try:
                        frames.append(frame_object(&frame))
                    finally:
                        Py_XDECREF(frame.owner)
            finally:
                self.close_window()
        finally:
            free(joined)
        if self.fault is not NULL:
            raise errors.FrameError(self.fault.decode(), limit=self.limit)
        return frames

    cdef int open_window(self, const uint8_t* data, size_t size) except -1:
        # The window holds the tail's bytes too: the caller copied them to its front.
        self.window = data
        self.position = 0
        self.end = size
        self.window_is_tail = False
        return 0

    cdef int open_tail(self) except -1:
        self.window = self.tail
        self.position = 0
        self.end = self.tail_size
        self.window_is_tail = True
        return 0

    cdef int close_window(self) except -1:
        # What follows a fault is of no use.
        cdef size_t left = self.end - self.position if self.fault is NULL else 0
        cdef uint8_t* memory
        if left == 0:
            free_tail(self)
        elif self.window_is_tail:
            if self.position:
                memmove(self.tail, self.window + self.position, left)
        else:
            if left > self.tail_capacity:
                memory = <uint8_t*>malloc(left)
                if memory is NULL:
                    self.tail_size = 0
                    self.fault = "no memory for the bytes that arrived"
                    raise MemoryError
                free_tail(self)
                live(LIVE_TAIL, 1)
                self.tail = memory
                self.tail_capacity = left
            copy(self.tail, self.window + self.position, left)
        self.tail_size = left
        self.window = NULL
        self.position = 0
        self.end = 0
        return 0

    cdef int next(self, RawFrame* frame) except -1:
        # 1: a frame; 0: no whole frame is left in the window, or self.fault says why.
        cdef const uint8_t* p = self.window + self.position
        cdef size_t available = self.end - self.position
        cdef size_t take
        cdef uint32_t length
        cdef uint16_t extend_size
        if self.fault is not NULL:
            return 0
        if self.wants_magic:
            if available < 4:
                return 0
            if load32(p) != MAGIC:
                self.fault = "wrong magic"
                return 0
            self.wants_magic = False
            self.position += 4
            p += 4
            available -= 4
        if self.big is not NULL:
            if self.big_have < self.big_size:
                take = min(available, self.big_size - self.big_have)
                if take:
                    self.grow_big(take)
                    copy(PyBytes_AS_STRING(<object>self.big) + self.big_have, p, take)
                    self.big_have += take
                    self.position += take
                    p += take
                    available -= take
                if self.big_have < self.big_size:
                    return 0
            if available < self.big_extend:
                return 0
            frame.channel = self.big_channel
            frame.extend_size = self.big_extend
            frame.size = <uint32_t>self.big_size
            frame.data = <const uint8_t*>PyBytes_AS_STRING(<object>self.big)
            frame.extend = p
            frame.owner = self.big
            live(LIVE_BIG, -1)
            self.big = NULL
            self.big_have = 0
            self.proven = max(self.proven, self.big_size)
            self.position += frame.extend_size
            return 1
        if available < HEADER:
            return 0
        length = load32(p)
        extend_size = load16(p + 4)
        if length < HEADER:
            self.fault = "a frame length below 8"
            return 0
        if length > self.limit:
            self.fault = "a frame length over the limit"
            return 0
        if extend_size > length - HEADER:
            self.fault = "an extend longer than its frame"
            return 0
        if available < length:
            if length >= BIG_FRAME and length - HEADER - extend_size > 0:
                self.begin_big(length, extend_size, load16(p + 6), available)
            return 0
        frame.channel = load16(p + 6)
        frame.extend_size = extend_size
        frame.size = length - HEADER - extend_size
        frame.data = p + HEADER
        frame.extend = frame.data + frame.size
        frame.owner = NULL
        self.position += length
        return 1

    cdef int begin_big(self, uint32_t length, uint16_t extend_size, uint16_t channel,
                       size_t available) except -1:
        # The window's rest is the beginning of a large frame: go on in its own bytes object.
        cdef size_t size = length - HEADER - extend_size
        cdef size_t have = min(available - HEADER, size)
        cdef object target = PyBytes_FromStringAndSize(
            NULL, min(size, max(<size_t>4096, have * 2, self.proven)))
        copy(PyBytes_AS_STRING(target), self.window + self.position + HEADER, have)
        Py_INCREF(target)
        self.big = <PyObject*>target
        live(LIVE_BIG, 1)
        self.big_size = size
        self.big_have = have
        self.big_extend = extend_size
        self.big_channel = channel
        self.position += HEADER + have
        return 0

    cdef int grow_big(self, size_t arriving) except -1:
        # Room for at least `arriving` more bytes, at most doubling what has arrived.
        cdef size_t capacity = <size_t>PyBytes_GET_SIZE(<object>self.big)
        cdef size_t wanted
        if self.big_have + arriving > capacity or (
                self.big_have == capacity and capacity < self.big_size):
            wanted = min(self.big_size,
                         max(self.big_have + arriving, self.big_have * 2, self.proven))
            if _PyBytes_Resize(&self.big, <Py_ssize_t>wanted) < 0:
                live(LIVE_BIG, -1)      # its memory is freed, and `big` is NULL
                self.big_have = 0
                self.fault = "no memory for the frame"
                return -1
        return 0

    cdef int room(self, uint8_t* shared, size_t capacity, uint8_t** where,
                  size_t* size) except -1:
        # Where the next bytes should be received, and how many of them. Between windows a tail is
        # less than one frame that is not received in place: under 65,544 bytes.
        if self.big is not NULL and self.big_have < self.big_size:
            self.grow_big(0)
            where[0] = <uint8_t*>PyBytes_AS_STRING(<object>self.big) + self.big_have
            size[0] = <size_t>PyBytes_GET_SIZE(<object>self.big) - self.big_have
        else:
            copy(shared, self.tail, self.tail_size)
            where[0] = shared + self.tail_size
            size[0] = min(<size_t>RECEIVE_SIZE, capacity - self.tail_size)
        return 0

    cdef int received(self, uint8_t* shared, size_t size) except -1:
        # `size` bytes are now where room() said; open the window over them.
        if self.big is not NULL and self.big_have < self.big_size:
            self.big_have += size
            self.open_window(shared, 0)
        else:
            self.open_window(shared, self.tail_size + size)
        return 0

    cdef void drop(self) noexcept:
        free_tail(self)
        if self.big is not NULL:
            live(LIVE_BIG, -1)
            Py_DECREF(<object>self.big)
            self.big = NULL
        self.big_have = 0


cdef inline bint next_whole(FrameReader reader, RawFrame* frame) noexcept:
    # Like next() right after a frame that next() gave, when there is neither a magic nor a fault
    # nor a large frame to think of; 0: next() is to look at what comes.
    cdef const uint8_t* p = reader.window + reader.position
    cdef size_t available = reader.end - reader.position
    cdef uint32_t body
    cdef uint16_t extend_size
    if available < HEADER:
        return False
    body = load32(p) - HEADER       # a length below a header's is beyond all that is available
    extend_size = load16(p + 4)
    if (body > available - HEADER or extend_size > body
            or body > reader.limit - HEADER):
        return False
    frame.channel = load16(p + 6)
    frame.extend_size = extend_size
    frame.size = body - extend_size
    frame.data = p + HEADER
    frame.extend = frame.data + frame.size
    frame.owner = NULL
    reader.position += HEADER + <size_t>body
    return True


cdef void free_tail(FrameReader reader) noexcept:
    if reader.tail is not NULL:
        live(LIVE_TAIL, -1)
        free(reader.tail)
        reader.tail = NULL
    reader.tail_capacity = 0
    reader.tail_size = 0
