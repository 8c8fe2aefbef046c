/**
 * The JavaScript client of a gateway, for browsers and Node: docs/javascript.md.
 *
 * It speaks the frames of docs/protocol.md, "Clients of a gateway", over a WebSocket; counts them;
 * keeps what it has sent until the gateway has it; and comes back when the connection is lost.
 */

const HELLO = 1;
const WELCOME = 2;
const RESUME = 3;
const RESUMED = 4;
const EXPIRED = 5;
const BYE = 6;
const HEARTBEAT = 7;
const GROUP = 8;
const REFUSED = 9;
const LOST = 10;
const COUNTED_FROM = GROUP;
const FIRST_EVENT = 50;
const LAST_EVENT = 0xffff;

const HEADER_SIZE = 8;
const ADDRESS_SIZE = 18;
const SESSION_SIZE = 24;
const MOST_U64 = 2n ** 64n - 1n;

const NORMAL = 1000;
const GOING_AWAY = 1001;
const PROTOCOL_ERROR = 1002;
const ABNORMAL = 1006;
const SUSPENDED = 4000;
const SILENT = 4005;
/** After these the client stays away: it has left, or would be refused again. */
const FINAL = new Set([NORMAL, PROTOCOL_ERROR, 1003, 1007, 1008, 1009, 4001, 4002, 4004]);
/** Milliseconds after which a connection has proved good, and the delays begin anew. */
const PROVEN = 5000;

const CLOSED = "the gateway has closed";
const EMPTY = new Uint8Array(0);
const encoder = new TextEncoder();
const decoder = new TextDecoder();

/**
 * @typedef {object} Reconnect  Milliseconds.
 * @property {number} [firstDelay]  The delay before the first try: between half of it and all. 200.
 * @property {number} [maxDelay]  It doubles with each try, up to this. 15,000.
 * @property {number} [stay]  How long a gateway that cannot be reached is tried for the session's
 *     sake before the next one of the list is. 5,000; a single gateway is tried for ever.
 *
 * @typedef {Uint8Array | string} Bytes  A string is sent as UTF-8.
 *
 * @typedef {object} Options
 * @property {Bytes | (() => Bytes | Promise<Bytes>)} [credentials]  What the gateway's
 *     `authenticate` judges; a function is asked each time that a session begins.
 * @property {string | null} [session]  What `client.session` or `suspend()` has given before.
 * @property {new (url: string) => WebSocket} [WebSocket]  Where there is no global one.
 * @property {Reconnect | false} [reconnect]  False: the program calls `connect()` itself.
 * @property {number} [heartbeat]  Milliseconds between pings; a gateway that is silent for twice as
 *     long is taken for lost. 10,000.
 * @property {number} [timeout]  Milliseconds for a connection and the gateway's answer. 10,000.
 * @property {number} [outboxFrames]  How many messages may wait until the gateway has them. 128:
 *     more than its `burst` would be too many at once, when they are sent again.
 * @property {number} [outboxBytes]  How many bytes of them. 1 MiB.
 *
 * @typedef {object} Sent  A message, as it was given to `send()` or `tell()`.
 * @property {bigint | null} group  Null: it was for the gateway.
 * @property {number} event
 * @property {Uint8Array} data
 * @property {bigint} node
 *
 * @typedef {object} Happenings
 * @property {{user: bigint, gateway: string, grace: number}} welcome  A session has begun; `grace`
 *     is how many milliseconds it may be away.
 * @property {{user: bigint, gateway: string, grace: number}} resumed  It goes on, nothing is lost.
 * @property {{reason: string, unconfirmed: Sent[]}} expired  It is over, and with it all
 *     memberships; a new one follows. The gateway may or may not have had what is unconfirmed.
 * @property {{group: bigint, event: number, code: number, reason: string}} refused
 * @property {{group: bigint, reason: string}} lost  The group is gone: join again.
 * @property {{code: number, reason: string}} away  The connection is lost, and tried again.
 * @property {{code: number, reason: string}} closed  It is, and stays so until `connect()`.
 *
 * @typedef {{id: Uint8Array, user: bigint, received: number, grace: number}} Session
 * @typedef {{event: number, data: Uint8Array, extend: Uint8Array}} Frame
 * @typedef {{promise: Promise<void>, resolve: () => void, reject: (error: Error) => void}} Waiter
 */

/** A client of one gateway at a time. */
export class DomiClient {
  /** @type {string[]} */ #urls;
  #at = 0;
  /** @type {new (url: string) => WebSocket} */ #WebSocket;
  /** @type {NonNullable<Options["credentials"]>} */ #credentials;
  /** @type {Required<Reconnect> | null} */ #reconnect;
  #heartbeat;
  #timeout;

  /** @type {"closed" | "connecting" | "open"} */ #state = "closed";
  /** @type {WebSocket | null} */ #socket = null;
  /** @type {ReturnType<typeof setTimeout> | undefined} */ #timer;
  /** @type {Waiter | null} */ #waiter = null;
  /** @type {Map<string | number, Set<(...values: any[]) => void>>} */ #handlers = new Map();

  /** @type {Session | null} */ #session = null;
  /** @type {Outbox} */ #outbox;
  /** How many frames the gateway has once it answers the ping that is out; null: none is.
   * @type {number | null} */
  #pinged = null;
  #heard = 0;
  #attempt = 0;
  #openSince = 0;
  #awaySince = 0;

  /**
   * @param {string | string[]} urls  ws:// or wss://, of one gateway or of several.
   * @param {Options} [options]
   */
  constructor(urls, options = {}) {
    this.#urls = typeof urls === "string" ? [urls] : [...urls];
    if (!this.#urls.length) throw new TypeError("no URL: give that of a gateway, ws:// or wss://");
    for (const url of this.#urls) {
      if (!/^wss?:\/\/./.test(url)) throw new TypeError(`URL ${url}: ws:// or wss:// is wanted`);
    }
    const found = options.WebSocket ?? globalThis.WebSocket;
    if (!found) {
      throw new TypeError("there is no global WebSocket (Node has one from 22): give WebSocket");
    }
    this.#WebSocket = found;
    this.#credentials = options.credentials ?? EMPTY;
    const reconnect = options.reconnect ?? {};
    const defaults = { firstDelay: 200, maxDelay: 15000, stay: 5000 };
    this.#reconnect = reconnect === false ? null : { ...defaults, ...reconnect };
    this.#heartbeat = options.heartbeat ?? 10000;
    this.#timeout = options.timeout ?? 10000;
    this.#outbox = new Outbox(options.outboxFrames ?? 128, options.outboxBytes ?? 2 ** 20);
    if (options.session) this.#restore(options.session);
  }

  /** The id of the user that this is; null without a session. */
  get user() {
    return this.#session?.user ?? null;
  }

  /** The URL of the gateway that it is connected to, or tries. */
  get gateway() {
    return /** @type {string} */ (this.#urls[this.#at]);
  }

  /** Whether there is a connection with a session. */
  get connected() {
    return this.#state === "open";
  }

  /**
   * All that another client needs to go on with this session, or null without one: its id, how
   * many frames were given to handlers (that which a handler is just dealing with among them), and
   * what the gateway may not have. It is as secret as a password.
   *
   * @returns {string | null}
   */
  get session() {
    if (!this.#session) return null;
    const { id, received, grace } = this.#session;
    return JSON.stringify({
      version: 1,
      gateway: this.gateway,
      id: toBase64(id),
      received,
      grace,
      confirmed: this.#outbox.confirmed,
      outbox: this.#outbox.frames.map(toBase64),
    });
  }

  /**
   * Connect, and go on trying. Resolves when there is a session: a new one, or the old one again.
   *
   * @returns {Promise<void>}  Rejected when `closed` happens before.
   */
  connect() {
    if (this.#state === "open") return Promise.resolve();
    if (!this.#waiter) {
      let resolve = () => {};
      let reject = (/** @type {Error} */ _) => {};
      /** @type {Promise<void>} */
      const promise = new Promise((done, failed) => ([resolve, reject] = [done, failed]));
      this.#waiter = { promise, resolve, reject };
    }
    const { promise } = this.#waiter;
    if (this.#state === "closed") {
      this.#state = "connecting";
      this.#attempt = 0;
      this.#awaySince = now();
      this.#open();
    }
    return promise;
  }

  /**
   * A message to a group. Without a connection it waits for one.
   *
   * @param {bigint | number} group
   * @param {number} event  50-65535.
   * @param {Uint8Array} [data]
   * @param {bigint | number} [node]  Which service: 0 is the gateway's own.
   * @throws {RangeError}  The outbox is full: the gateway has not had so much yet.
   */
  send(group, event, data = EMPTY, node = 0n) {
    const extend = new DataView(new ArrayBuffer(ADDRESS_SIZE));
    extend.setBigUint64(0, toU64(node, "node"), true);
    extend.setBigUint64(8, toU64(group, "group"), true);
    extend.setUint16(16, checkEvent(event), true);
    this.#put(encode(GROUP, checkData(data), new Uint8Array(extend.buffer)));
  }

  /**
   * A message to the gateway's own program. Without a connection it waits for one.
   *
   * @param {number} event  50-65535.
   * @param {Uint8Array} [data]
   * @throws {RangeError}  The outbox is full: the gateway has not had so much yet.
   */
  tell(event, data = EMPTY) {
    this.#put(encode(checkEvent(event), checkData(data)));
  }

  /**
   * Have a function called for an event of 50 and above, with the data, or for a happening.
   *
   * @overload
   * @param {number} event
   * @param {(data: Uint8Array) => void} fn
   * @returns {() => void}  Ends it.
   */
  /**
   * @template {keyof Happenings} Name
   * @overload
   * @param {Name} event
   * @param {(happening: Happenings[Name]) => void} fn
   * @returns {() => void}  Ends it.
   */
  /**
   * @param {string | number} event
   * @param {(value: any) => void} fn
   */
  on(event, fn) {
    if (typeof event === "number") checkEvent(event);
    const handlers = this.#handlers.get(event) ?? new Set();
    this.#handlers.set(event, handlers.add(fn));
    return () => void handlers.delete(fn);
  }

  /**
   * Close the connection and keep the session, for `connect()` or for another client. From here on
   * no frame is given to a handler, so that what this returns stays true.
   *
   * @returns {string | null}  `session`.
   */
  suspend() {
    this.#drop(SUSPENDED, "suspended");
    this.#state = "closed";
    return this.session;
  }

  /** Leave: the session is over, and what still waits is dropped. */
  close() {
    if (this.#state !== "closed") this.#end(NORMAL, "");
    this.#forget();
  }

  /** @param {string} text */
  #restore(text) {
    try {
      const kept = JSON.parse(text);
      const id = fromBase64(kept.id);
      const counts = [kept.received, kept.grace, kept.confirmed];
      if (kept.version !== 1 || id.length !== SESSION_SIZE || !counts.every(Number.isInteger)) {
        throw new TypeError("it is none of this version");
      }
      this.#session = { id, user: userOf(id), received: kept.received, grace: kept.grace };
      this.#outbox.restore(kept.confirmed, kept.outbox.map(fromBase64));
      this.#at = Math.max(this.#urls.indexOf(kept.gateway), 0);
    } catch (error) {
      throw new TypeError(`session: give what client.session has been, or null (${error})`);
    }
  }

  #open() {
    const socket = new this.#WebSocket(this.gateway);
    this.#socket = socket;
    this.#limit();
    socket.binaryType = "arraybuffer";
    let opened = false;
    socket.onopen = () => {
      opened = true;
      void this.#begin(socket);
    };
    socket.onmessage = (event) => this.#hear(event.data);
    socket.onclose = (event) => this.#lose(event.code, event.reason);
    // Node's WebSocket says no more than this of a connection that cannot be made.
    socket.onerror = () => {
      if (!opened && socket === this.#socket) this.#lose(ABNORMAL, "no connection");
    };
  }

  #limit() {
    clearTimeout(this.#timer);
    const late = `no answer within ${this.#timeout} ms`;
    this.#timer = setTimeout(() => this.#lose(ABNORMAL, late), this.#timeout);
  }

  /** @param {WebSocket} socket */
  async #begin(socket) {
    if (this.#session) {
      const data = new Uint8Array(SESSION_SIZE + 8);
      data.set(this.#session.id);
      view(data).setBigUint64(SESSION_SIZE, BigInt(this.#session.received), true);
      socket.send(encode(RESUME, data));
      return;
    }
    const given = this.#credentials;
    try {
      const credentials = typeof given === "function" ? await given() : given;
      const data = typeof credentials === "string" ? encoder.encode(credentials) : credentials;
      if (socket === this.#socket) socket.send(encode(HELLO, data));
    } catch (error) {
      if (socket === this.#socket) this.#lose(ABNORMAL, `no credentials: ${error}`);
    }
  }

  /** @param {string | ArrayBuffer} message */
  #hear(message) {
    if (typeof message === "string") return this.#fail("a text message: frames are binary");
    const frame = decode(message);
    if (!frame) return this.#fail(`a message of ${message.byteLength} bytes that is no frame`);
    this.#heard = now();
    try {
      if (frame.event >= COUNTED_FROM) this.#take(frame);
      else this.#control(frame);
    } catch (error) {
      if (!(error instanceof RangeError)) throw error;
      this.#fail(`event ${frame.event} with ${frame.data.length} bytes: it has more`);
    }
  }

  /** @param {Frame} frame */
  #control({ event, data }) {
    const fields = view(data);
    switch (event) {
      case WELCOME: {
        if (this.#state === "open" || this.#session) return this.#fail("WELCOME out of turn");
        const grace = fields.getUint32(SESSION_SIZE, true);
        const id = data.slice(0, SESSION_SIZE);
        this.#session = { id, user: userOf(id), received: 0, grace };
        return this.#opened("welcome", this.#session);
      }
      case RESUMED: {
        if (this.#state === "open" || !this.#session) return this.#fail("RESUMED out of turn");
        const has = Number(fields.getBigUint64(0, true));
        this.#session.grace = fields.getUint32(8, true);
        if (!this.#outbox.confirm(has)) {
          return this.#startOver(`another page has gone on with it: ${has} frames are there`);
        }
        return this.#opened("resumed", this.#session);
      }
      case EXPIRED:
        if (this.#state === "open" || !this.#session) return this.#fail("EXPIRED out of turn");
        this.#expire(decoder.decode(data));
        // A handler may have closed or suspended it.
        if (this.#socket) {
          this.#limit();
          void this.#begin(this.#socket);
        }
        return;
      case BYE:
        return this.#lose(fields.getUint16(0, true), decoder.decode(data.subarray(2)));
      case HEARTBEAT:
        if (decoder.decode(data) === "ping") return this.#socket?.send(encode(HEARTBEAT, PONG));
        if (this.#pinged !== null) this.#outbox.confirm(this.#pinged);
        this.#pinged = null;
    }
  }

  /** @param {Frame} frame */
  #take({ event, data }) {
    if (this.#state !== "open" || !this.#session) return this.#fail(`event ${event} out of turn`);
    const fields = view(data);
    if (event === REFUSED) {
      const group = fields.getBigUint64(0, true);
      const [which, code] = [fields.getUint16(8, true), fields.getUint16(10, true)];
      const reason = decoder.decode(data.subarray(12));
      this.#session.received += 1;
      this.#emit("refused", { group, event: which, code, reason });
    } else if (event === LOST) {
      const group = fields.getBigUint64(0, true);
      this.#session.received += 1;
      this.#emit("lost", { group, reason: decoder.decode(data.subarray(8)) });
    } else {
      this.#session.received += 1;
      this.#emit(event, data);
    }
  }

  /**
   * @param {"welcome" | "resumed"} how
   * @param {Session} session
   */
  #opened(how, { user, grace }) {
    this.#state = "open";
    this.#openSince = this.#heard;
    this.#pinged = null;
    clearTimeout(this.#timer);
    this.#timer = setInterval(() => this.#beat(), this.#heartbeat);
    for (const frame of this.#outbox.frames) this.#socket?.send(frame);
    const waiter = this.#waiter;
    this.#waiter = null;
    this.#emit(how, { user, gateway: this.gateway, grace });
    waiter?.resolve();
  }

  #beat() {
    const silence = now() - this.#heard;
    if (this.#pinged === null) this.#ping();
    else if (silence >= this.#heartbeat) this.#lose(SILENT, `silent for ${Math.round(silence)} ms`);
  }

  /** Its answer also says that the gateway has had all that was sent before. */
  #ping() {
    this.#pinged = this.#outbox.confirmed + this.#outbox.frames.length;
    this.#socket?.send(encode(HEARTBEAT, PING));
  }

  /** @param {Uint8Array<ArrayBuffer>} frame */
  #put(frame) {
    this.#outbox.put(frame);
    if (this.#state !== "open") return;
    this.#socket?.send(frame);
    if (this.#pinged === null && this.#outbox.fullness >= 0.25) this.#ping();
  }

  /**
   * @param {number} code
   * @param {string} reason
   */
  #lose(code, reason) {
    const was = this.#state;
    this.#drop(code === SILENT ? SILENT : SUSPENDED, reason);
    if (FINAL.has(code)) {
      this.#forget();
      return this.#end(code, reason);
    }
    this.#state = "connecting";
    const settings = this.#reconnect;
    let over = code === GOING_AWAY ? reason || CLOSED : "";
    if (!settings) {
      if (over && this.#session) this.#expire(over);
      return this.#end(code, reason);
    }
    if (was === "open") {
      this.#awaySince = now();
      if (this.#awaySince - this.#openSince >= PROVEN) this.#attempt = 0;
    } else if (!over && this.#session) {
      over = this.#unreached(settings.stay);
      // The next gateway is not the one that was tried in vain.
      if (over) this.#attempt = 0;
    }
    let most = Math.min(settings.firstDelay * 2 ** this.#attempt, settings.maxDelay);
    this.#attempt += 1;
    if (over || (!this.#session && was !== "open")) this.#at = (this.#at + 1) % this.#urls.length;
    else if (this.#urls.length > 1) most = Math.min(most, settings.stay);
    this.#timer = setTimeout(() => this.#open(), most * (0.5 + Math.random() / 2));
    if (was === "open") this.#emit("away", { code, reason });
    if (over && this.#session) this.#expire(over);
  }

  /**
   * Why a session is given up whose gateway was not reached; empty while it is not.
   *
   * @param {number} stay
   */
  #unreached(stay) {
    const away = now() - this.#awaySince;
    if (away >= (this.#session?.grace ?? 0)) return "the time of grace is over";
    return this.#urls.length > 1 && away >= stay ? "its gateway is out of reach" : "";
  }

  /** @param {string} reason */
  #expire(reason) {
    const unconfirmed = this.#outbox.frames.map(sentOf);
    this.#forget();
    this.#emit("expired", { reason, unconfirmed });
  }

  /** Somebody else has gone on with this session: what is known of it here is out of date.
   * @param {string} reason */
  #startOver(reason) {
    this.#drop(NORMAL, reason);
    this.#expire(reason);
    if (this.#state === "connecting") this.#open();
  }

  /** The gateway says what it may not, and would do so again.
   * @param {string} reason */
  #fail(reason) {
    this.#drop(NORMAL, "");
    this.#forget();
    this.#end(PROTOCOL_ERROR, reason);
  }

  /**
   * @param {number} code
   * @param {string} reason
   */
  #end(code, reason) {
    this.#drop(NORMAL, "");
    this.#state = "closed";
    const waiter = this.#waiter;
    this.#waiter = null;
    this.#emit("closed", { code, reason });
    waiter?.reject(new Error(`the connection is closed: ${code} ${reason}`.trimEnd()));
  }

  #forget() {
    this.#session = null;
    this.#outbox.restore(0, []);
  }

  /**
   * No more is heard of the connection, whenever its end comes.
   *
   * @param {number} code
   * @param {string} reason
   */
  #drop(code, reason) {
    clearTimeout(this.#timer);
    this.#pinged = null;
    const socket = this.#socket;
    this.#socket = null;
    if (!socket) return;
    socket.onopen = socket.onmessage = socket.onclose = null;
    // A close frame has room for 123 bytes of reason; beyond that close() raises.
    socket.close(code, reason.slice(0, 40));
  }

  /**
   * @param {string | number} event
   * @param {unknown} value
   */
  #emit(event, value) {
    for (const handler of [...(this.#handlers.get(event) ?? [])]) {
      try {
        handler(value);
      } catch (error) {
        // It is the page's to hear of, and neither the other handlers' nor the connection's.
        queueMicrotask(() => {
          throw error;
        });
      }
    }
  }
}

const PING = encoder.encode("ping");
const PONG = encoder.encode("pong");

/** What was sent and may not have come: frames in order, whose numbers in the session go on. */
class Outbox {
  /** @type {Uint8Array<ArrayBuffer>[]} */ frames = [];
  /** How many frames before these the gateway has. */
  confirmed = 0;
  #bytes = 0;
  #mostFrames;
  #mostBytes;

  /**
   * @param {number} mostFrames
   * @param {number} mostBytes
   */
  constructor(mostFrames, mostBytes) {
    this.#mostFrames = mostFrames;
    this.#mostBytes = mostBytes;
  }

  get fullness() {
    return Math.max(this.frames.length / this.#mostFrames, this.#bytes / this.#mostBytes);
  }

  /** @param {Uint8Array<ArrayBuffer>} frame */
  put(frame) {
    const bytes = this.#bytes + frame.length;
    if (this.frames.length >= this.#mostFrames || bytes > this.#mostBytes) {
      throw new RangeError(
        `the outbox is full: ${this.frames.length} messages of ${this.#bytes} bytes wait, and ` +
          `${this.#mostFrames} of ${this.#mostBytes} bytes may; send less, or raise outboxFrames ` +
          "and outboxBytes",
      );
    }
    this.#bytes = bytes;
    this.frames.push(frame);
  }

  /**
   * @param {number} count  How many frames of the session the gateway has.
   * @returns {boolean}  False: that cannot be.
   */
  confirm(count) {
    const more = count - this.confirmed;
    if (more < 0 || more > this.frames.length) return false;
    for (const frame of this.frames.splice(0, more)) this.#bytes -= frame.length;
    this.confirmed = count;
    return true;
  }

  /**
   * @param {number} confirmed
   * @param {Uint8Array<ArrayBuffer>[]} frames
   */
  restore(confirmed, frames) {
    this.confirmed = confirmed;
    this.frames = frames;
    this.#bytes = frames.reduce((sum, frame) => sum + frame.length, 0);
  }
}

/**
 * @param {number} event
 * @param {Uint8Array} data
 * @param {Uint8Array} [extend]
 */
function encode(event, data, extend = EMPTY) {
  const frame = new Uint8Array(HEADER_SIZE + data.length + extend.length);
  const header = view(frame);
  header.setUint32(0, frame.length, true);
  header.setUint16(4, extend.length, true);
  header.setUint16(6, event, true);
  frame.set(data, HEADER_SIZE);
  frame.set(extend, HEADER_SIZE + data.length);
  return frame;
}

/**
 * @param {ArrayBufferLike} message
 * @returns {Frame | null}
 */
function decode(message) {
  const frame = new Uint8Array(message);
  if (frame.length < HEADER_SIZE) return null;
  const header = view(frame);
  const end = frame.length - header.getUint16(4, true);
  if (header.getUint32(0, true) !== frame.length || end < HEADER_SIZE) return null;
  const event = header.getUint16(6, true);
  return { event, data: frame.subarray(HEADER_SIZE, end), extend: frame.subarray(end) };
}

/**
 * @param {Uint8Array<ArrayBuffer>} frame
 * @returns {Sent}
 */
function sentOf(frame) {
  const { event, data, extend } = /** @type {Frame} */ (decode(frame.buffer));
  if (event !== GROUP) return { group: null, event, data, node: 0n };
  const address = view(extend);
  const [node, group] = [address.getBigUint64(0, true), address.getBigUint64(8, true)];
  return { group, event: address.getUint16(16, true), data, node };
}

/** @param {Uint8Array} bytes */
function view(bytes) {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

/** @param {Uint8Array} id */
function userOf(id) {
  return view(id).getBigUint64(0, true);
}

function now() {
  return performance.now();
}

/** @param {number} event */
function checkEvent(event) {
  if (Number.isInteger(event) && event >= FIRST_EVENT && event <= LAST_EVENT) return event;
  throw new RangeError(`event ${event}: ${FIRST_EVENT} to ${LAST_EVENT} are allowed`);
}

/** @param {Uint8Array} data */
function checkData(data) {
  if (data instanceof Uint8Array) return data;
  throw new TypeError("data: a Uint8Array is wanted (of text: new TextEncoder().encode(text))");
}

/**
 * @param {bigint | number} value
 * @param {string} name
 */
function toU64(value, name) {
  if (typeof value === "bigint" ? value <= MOST_U64 : Number.isSafeInteger(value)) {
    if (value >= 0) return BigInt(value);
  }
  throw new RangeError(`${name} ${value}: 0 to 2**64-1 are allowed, from 2**53 on as a bigint`);
}

/** @param {Uint8Array} bytes */
function toBase64(bytes) {
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return btoa(text);
}

/** @param {string} text */
function fromBase64(text) {
  return Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
}
