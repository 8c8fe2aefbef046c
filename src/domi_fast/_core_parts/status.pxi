# How a message failed: the status of ANSWER and REJECT frames and the exception it stands for.
# What a peer says about itself, or about us, is made printable before it is in an error, a reason
# or a record: else it could write lines of its own into a log. Of a RemoteError nothing is changed:
# its text is the program's on either side.

cpdef str printable(str text):
    """The text with an escape for each character that is not printable."""
    if text.isprintable():
        return text
    return "".join([sign if sign.isprintable()
                    else sign.encode("unicode_escape", "surrogatepass").decode()
                    for sign in text])


cdef str said_by_peer(bytes data):
    return printable(data.decode(errors="replace"))


cdef object failure(uint8_t status, bytes data, int channel, int peer):
    # The exception that a status stands for.
    if status == STATUS_REMOTE_ERROR:
        kind, _, message = data.decode(errors="replace").partition("\0")
        return errors.RemoteError(kind or "Error", message, channel=channel, peer=peer)
    if status == STATUS_CIRCUIT_OPEN:
        # Of a guest's message: the circuit is its node's to a third one, which is named.
        peer = load16(<uint8_t*>PyBytes_AS_STRING(data)) if len(data) >= 2 else NO_MACHINE
        data = data[2:]
        if peer >= MAX_MACHINES:
            peer = -1
    kind, default = {
        STATUS_NO_SUBSCRIBER: (errors.NoSubscriber, "nobody subscribes to channel {channel}"),
        STATUS_OVERLOADED: (errors.Overloaded, "the receiver of channel {channel} is overloaded"),
        STATUS_PEER_LOST: (errors.PeerLost, "the receiver of channel {channel} is gone"),
        STATUS_DEADLINE: (errors.DeadlineExceeded, "no answer on channel {channel} in time"),
        STATUS_CIRCUIT_OPEN: (
            errors.CircuitOpen,
            "who subscribes to channel {channel} is left alone until it answers a ping"),
    }.get(status, (errors.DomiError, "the receiver refused a message on channel {channel}"))
    text = said_by_peer(data) or default.format(channel=channel)
    return kind(text, channel=channel, peer=peer if peer >= 0 else None)


cdef bytes text_of(object error):
    # Text for the wire, of whatever a program raised: its __str__ may raise, and hold anything.
    # What advice it ends with is for who got it here.
    try:
        text = str(error)
        if isinstance(error, errors.Overloaded):
            text = text.removesuffix(error.advice)
    except Exception as raised:
        text = f"<{type(error).__name__} whose text raises {type(raised).__name__}>"
    return text.encode(errors="replace")


cdef object as_domi_error(object error, int channel):
    # For on_error, which is promised DomiErrors: a policy of the program's may raise anything.
    if isinstance(error, errors.DomiError):
        return error
    told = errors.DomiError(
        f"a message on channel {channel} could not be sent: "
        f"{type(error).__name__}: {text_of(error).decode()}", channel=channel)
    told.__cause__ = error
    return told


cdef tuple status_of(object error):
    # The status and text that stand for an exception: the reverse of failure().
    if isinstance(error, errors.RemoteError):
        return STATUS_REMOTE_ERROR, text_of(error.type) + b"\0" + text_of(error.message)
    if isinstance(error, errors.CircuitOpen):
        peer = NO_MACHINE if error.peer is None else error.peer
        return STATUS_CIRCUIT_OPEN, (<int>peer).to_bytes(2, "little") + text_of(error)
    for status, kind in ((STATUS_NO_SUBSCRIBER, errors.NoSubscriber),
                         (STATUS_OVERLOADED, errors.Overloaded),
                         (STATUS_PEER_LOST, errors.PeerLost),
                         (STATUS_DEADLINE, errors.DeadlineExceeded)):
        if isinstance(error, kind):
            return status, text_of(error)
    if isinstance(error, errors.DomiError):
        return STATUS_REFUSED, text_of(error)
    return STATUS_REMOTE_ERROR, remote_error(error)
