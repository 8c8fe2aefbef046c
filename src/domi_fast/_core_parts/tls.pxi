# The descriptor of a session whose bytes are enciphered: TLS 1.3, by the ssl module, over memory.
#
# Invariants: what is sent is enciphered a record at a time, and counts as sent once the kernel has
# the whole record (of less of it the peer can make nothing); the bytes of a handshake that fails
# are never sent, so who is refused is not told why; whatever the ssl module raises, a signal's
# handler within it included, ends the session, whose stream nobody could go on with; and as it runs
# Python, the session may be closed after each call of it, and no memory but this file's own is lent
# to it. Owned by the loop thread.

cdef enum:
    TLS_RECORD = 16384          # bytes of plain text in a record, at most
    TLS_HANDSHAKE_MOST = 65536  # bytes that a peer may send before its handshake is complete
    TLS_SILENT_MOST = 32768     # bytes without any plain text in them, afterwards: more than a
                                # record, and what our own ends never send


cdef object tls_reason(error):
    # Why the ssl module would not go on, in its words, without the line of its source.
    return (getattr(error, "verify_message", None) or getattr(error, "reason", None)
            or str(error) or type(error).__name__).lower().replace("_", " ")


@cython.final
cdef class TlsDriver(SocketDriver):
    """Owns a descriptor, and the TLS of the connection, once it is wrapped."""

    cdef int wrap(self, context, bint server_side) except -1:
        self.incoming = ssl.MemoryBIO()
        self.outgoing = ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side=server_side)
        return 0

    cdef int begin(self, bytes first) except -1:
        # What is to be said first goes out with the end of the handshake, which begins.
        self.first = first
        return self.shake() or self.push()

    cdef int shake(self) except -1:
        # One step of the handshake: 0, or EPROTO with `fault` set.
        tls = self.tls
        if self.fd < 0:
            return EPROTO
        try:
            tls.do_handshake()
            self.certificate = tls.getpeercert()
            # That of the dialler's last message, in TLS 1.3: of this connection and no other.
            self.binding = tls.get_channel_binding("tls-unique")
            self.secure = True
            if self.first:
                tls.write(self.first)
                self.first = None
        except ssl.SSLWantReadError:
            pass
        except (OSError, ValueError) as error:
            self.fault = errors.AuthError(f"the TLS handshake failed: {tls_reason(error)}")
            return EPROTO
        except BaseException:
            self.fault = errors.AuthError("the TLS handshake was interrupted")
            raise
        return EPROTO if self.fd < 0 else 0

    cdef int push(self) except -1:
        # Send what the handshake has to say: 0, or an errno. The kernel has room for it, as for
        # all that comes first.
        cdef bytes data = self.outgoing.read()
        cdef Py_ssize_t n
        if not data:
            return 0
        n = c_send(self.fd, PyBytes_AS_STRING(data), len(data))
        if n < 0 and errno != EAGAIN:
            return errno
        if n < len(data):
            self.fault = errors.AuthError("the TLS handshake failed: the peer reads nothing of it")
            return EPROTO
        return 0

    cdef Py_ssize_t recv(self, uint8_t* where, size_t size) except -4096:
        cdef uint8_t sealed[2 * TLS_RECORD]
        cdef Py_ssize_t n
        cdef int failure
        while True:
            if self.fault is not None or self.fd < 0:
                return -EPROTO
            if self.secure and (self.incoming.pending or self.tls.pending()):
                n = self.decipher(where, size)
                if n != -EAGAIN:
                    return n
            n = SocketDriver.recv(self, sealed, sizeof(sealed))
            if n <= 0:
                return n
            self.heard = True
            self.silent += n
            self.incoming.write(PyMemoryView_FromMemory(<char*>sealed, n, PyBUF_READ))
            if self.secure:
                if self.silent > TLS_SILENT_MOST + <size_t>n:
                    self.fault = errors.FrameError(
                        f"{self.silent} bytes of TLS came, and nothing is in them")
                continue
            failure = self.shake()
            if failure == 0 and not self.secure and self.silent > TLS_HANDSHAKE_MOST:
                self.fault = errors.AuthError(
                    f"the TLS handshake failed: it is not complete after {self.silent} bytes")
                failure = EPROTO
            if failure == 0:
                failure = self.push()
            if failure:
                return -failure
            if self.secure:
                self.silent = 0
                if self.waiting is not None:
                    self.engine.call_soon(self.waiting)
                    self.waiting = None

    cdef Py_ssize_t decipher(self, uint8_t* where, size_t size) except -4096:
        # Bytes of plain text, 0 at the end of the stream, or -errno.
        cdef uint8_t text[TLS_RECORD]
        cdef Py_ssize_t n
        try:
            n = self.tls.read(min(size, <size_t>TLS_RECORD),
                              PyMemoryView_FromMemory(<char*>text, TLS_RECORD, PyBUF_WRITE))
        except ssl.SSLWantReadError:
            return -EAGAIN
        except (OSError, ValueError) as error:
            self.fault = errors.FrameError(f"what came cannot be deciphered: {tls_reason(error)}")
            return -EPROTO
        except BaseException:
            self.fault = errors.FrameError("the deciphering was interrupted")
            raise
        if self.fd < 0:
            return -EPROTO      # and `where` may be gone with the session
        copy(where, text, n)
        self.silent = 0
        return n

    cdef Py_ssize_t send(self, WriteQueue queue) except -4096:
        cdef Py_ssize_t n
        if self.fault is not None:
            return -EPROTO
        if not self.secure or self.enciphering:
            return -EAGAIN
        if self.record is None:
            self.encipher(queue)
            if self.fault is not None or self.fd < 0:
                return -EPROTO
        while self.record_sent < <size_t>PyBytes_GET_SIZE(self.record):
            n = c_send(self.fd, PyBytes_AS_STRING(self.record) + self.record_sent,
                       <size_t>PyBytes_GET_SIZE(self.record) - self.record_sent)
            if n >= 0:
                self.record_sent += n
            elif errno != EINTR:
                return -errno
        self.record = None
        queue.pinned = 0
        return self.plain

    cdef int encipher(self, WriteQueue queue) except -1:
        # The next record, or a fault. The queue keeps its bytes until they count as sent, and grows
        # at its end alone. The ssl module may run a finalizer that sends: not from here.
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
        queue.pinned = self.plain
        self.enciphering = True
        outgoing = self.outgoing
        try:
            self.tls.write(PyMemoryView_FromMemory(<char*>text, self.plain, PyBUF_READ))
            self.record = outgoing.read()
            self.record_sent = 0
        except (OSError, ValueError) as error:
            self.fault = errors.FrameError(f"nothing can be enciphered: {tls_reason(error)}")
        except BaseException:
            self.fault = errors.FrameError("the enciphering was interrupted")
            raise
        finally:
            self.enciphering = False
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
        self.tls = self.incoming = self.outgoing = None
        return SocketDriver.close(self)


cdef SocketDriver new_driver(Engine engine, int fd, context, bint server_side):
    cdef TlsDriver driver
    if context is None:
        return SocketDriver(engine, fd)
    driver = TlsDriver(engine, fd)
    driver.wrap(context, server_side)
    return driver
