"""Joins orders, payments and stock: a line for each order once all three are there, until Ctrl-C.

In one terminal:    python examples/serial_join/desk.py
In another:         python examples/serial_join/departments.py

Each handler runs to its end before the next one begins, so the totals need no lock.
"""

from domi_fast import JoinContext, Node, Serial, run

ORDERS, PAYMENTS, STOCK = 70, 71, 72

node = Node("desk")
serial = Serial(node)
shipped = refused = 0


@serial.subscribe_all([ORDERS, PAYMENTS, STOCK])
def join(joined: JoinContext) -> None:
    global shipped, refused
    # One message of each channel, first in, first out, in the order in which they were given.
    order, payment, stock = (request.data.decode() for request in joined.requests)
    if payment == "paid" and int(stock) > 0:
        shipped += 1
        print(f"{order}: shipped", flush=True)
    else:
        refused += 1
        print(f"{order}: refused ({payment}, {stock} in stock)", flush=True)
    for request in joined.requests:
        if request.is_request:
            request.reply(b"done")


def report() -> None:
    print(f"so far {shipped} shipped and {refused} refused", flush=True)


serial.every(60.0, report)

if __name__ == "__main__":
    print("the desk waits for the departments; Ctrl-C stops it", flush=True)
    run(node, serial)
