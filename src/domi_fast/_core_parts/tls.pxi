# The descriptor of a session whose bytes are enciphered: TLS 1.3, by the ssl module, over memory.
#
# Invariants: what is sent is enciphered a record at a time, and counts as sent once the kernel has
# the whole record (of less of it the peer can make nothing); the bytes of a handshake that fails
# are never sent, so who is refused is not told why. Owned by the loop thread.

cdef enum:
    TLS_RECORD = 16384          # bytes of plain text in a record, at most
    TLS_HANDSHAKE_MOST = 65536  # bytes that a peer may send before its handshake is complete

cdef object tls_reason(error):
    # Why the ssl module would not go on, in its words, without the line of its source.
    return (getattr(error, "verify_message", None) or getattr(error, "reason", None)
            or str(error) or type(error).__name__).lower().replace("_", " ")


@cython.final
cdef class TlsDriver(SocketDriver):
    """Owns a descriptor, and the TLS of the connection, once it is wrapped."""

    cdef int wrap(self, context, bint dialled) except -1:
        # The context is of the side that has dialled, or was dialled.
        self.incoming = ssl.MemoryBIO()
        self.outgoing = ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side=dialled)
        return 0

    cdef int begin(self, bytes first) except -1:
        # What is to be said first goes out with the end of the handshake, which begins.
        self.first = first
        return self.shake() or self.push()

    cdef int shake(self) except -1:
        # One step of the handshake: 0, or EPROTO with `fault` set.
        try:
            self.tls.do_handshake()
            self.secure = True
            self.certificate = self.tls.getpeercert()
            if self.first:
                self.tls.write(self.first)
                self.first = None
        except ssl.SSLWantReadError:
            pass
        except (OSError, ValueError) as error:
            self.fault = errors.AuthError(f"the TLS handshake failed: {tls_reason(error)}")
            return EPROTO
        return 0

    cdef int push(self) except -1:
        # Send what the handshake has to say: 0, or an errno. The kernel has room for it, as for
        # all that comes first.
        cdef bytes data = self.outgoing.read()
        if data and c_send(self.fd, PyBytes_AS_STRING(data), len(data)) != len(data):
            self.fault = errors.AuthError("the TLS handshake failed: the peer reads nothing of it")
            return EPROTO
        return 0

    cdef Py_ssize_t recv(self, uint8_t* where, size_t size) except -4096:
        cdef uint8_t sealed[2 * TLS_RECORD]
        cdef Py_ssize_t n
        cdef int failure
        while True:
            if self.secure and (self.incoming.pending or self.tls.pending()):
                n = self.decipher(where, size)
                if n != -EAGAIN:
                    return n
            n = SocketDriver.recv(self, sealed, sizeof(sealed))
            if n <= 0:
                return n
            self.incoming.write(PyMemoryView_FromMemory(<char*>sealed, n, PyBUF_READ))
            if self.secure:
                continue
            self.shaken += n
            failure = self.shake()
            if failure == 0 and not self.secure and self.shaken > TLS_HANDSHAKE_MOST:
                self.fault = errors.AuthError(
                    f"the TLS handshake failed: it is not complete after {self.shaken} bytes")
                failure = EPROTO
            if failure == 0:
                failure = self.push()
            if failure:
                return -failure
            if self.secure and self.waiting is not None:
                self.engine.call_soon(self.waiting)
                self.waiting = None

    cdef Py_ssize_t decipher(self, uint8_t* where, size_t size) except -4096:
        # Bytes of plain text, 0 at the end of the stream, or -errno.
        if self.fault is not None:
            return -EPROTO
        try:
            return self.tls.read(size, PyMemoryView_FromMemory(<char*>where, size, PyBUF_WRITE))
        except ssl.SSLWantReadError:
            return -EAGAIN
        except ssl.SSLZeroReturnError:
            return 0
        except (OSError, ValueError) as error:
            self.fault = errors.FrameError(f"what came cannot be deciphered: {tls_reason(error)}")
            return -EPROTO

    cdef Py_ssize_t send(self, WriteQueue queue) except -4096:
        cdef Py_ssize_t n
        if not self.secure:
            return -EAGAIN
        if self.fault is not None:
            return -EPROTO
        if self.record is None:
            self.encipher(queue)
        while self.record_sent < <size_t>PyBytes_GET_SIZE(self.record):
            n = c_send(self.fd, PyBytes_AS_STRING(self.record) + self.record_sent,
                       <size_t>PyBytes_GET_SIZE(self.record) - self.record_sent)
            if n >= 0:
                self.record_sent += n
            elif errno != EINTR:
                return -errno
        self.record = None
        return self.plain

    cdef int encipher(self, WriteQueue queue) except -1:
        # The next record. The queue keeps its bytes until they count as sent, and grows at its end
        # alone.
        cdef uint8_t text[TLS_RECORD]
        cdef iovec vectors[MAX_VECTORS]
        cdef size_t size
        cdef int i
        self.plain = 0
        for i in range(queue.gather(vectors, MAX_VECTORS)):
            size = min(vectors[i].iov_len, TLS_RECORD - self.plain)
            copy(text + self.plain, vectors[i].iov_base, size)
            self.plain += size
            if self.plain == TLS_RECORD:
                break
        self.tls.write(PyMemoryView_FromMemory(<char*>text, self.plain, PyBUF_READ))
        self.record = self.outgoing.read()
        self.record_sent = 0
        return 0

    cdef int want_write(self, object callback) except -1:
        if self.secure:
            return SocketDriver.want_write(self, callback)
        # No room in the socket helps, but the end of the handshake does.
        self.waiting = callback
        self.writing = True
        return 0

    cdef int close(self) except -1:
        self.waiting = self.record = self.first = None
        return SocketDriver.close(self)


cdef SocketDriver new_driver(Engine engine, int fd, context, bint dialled):
    cdef TlsDriver driver
    if context is None:
        return SocketDriver(engine, fd)
    driver = TlsDriver(engine, fd)
    driver.wrap(context, dialled)
    return driver
