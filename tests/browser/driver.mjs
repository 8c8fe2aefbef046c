// Drives client.js for test_client.py: a command a line on the standard input, and a line of JSON
// for all that happens. Data is text here, and big integers are strings.

import { createInterface } from "node:readline";

const { DomiClient } = await import(process.argv[2]);
const encode = (text) => new TextEncoder().encode(text);
const decode = (data) => new TextDecoder().decode(data);

function say(what, value) {
  const plain = (_, each) =>
    typeof each === "bigint" ? String(each) : each instanceof Uint8Array ? decode(each) : each;
  process.stdout.write(`${JSON.stringify([what, value ?? null], plain)}\n`);
}

const HAPPENINGS = ["welcome", "resumed", "expired", "refused", "lost", "away", "closed"];
let client;

const commands = {
  make(urls, options) {
    if (options.asks) options.credentials = async () => options.asks;
    client = new DomiClient(urls, options);
    for (const name of HAPPENINGS) client.on(name, (happening) => say(name, happening));
    for (const event of [50, 51]) client.on(event, (data) => say(event, data));
    client.on(52, () => say("session", client.session));
    client.on(53, () => {
      throw new Error("of a handler");
    });
  },
  connect() {
    client.connect().then(
      () => say("connected", client.user),
      (error) => say("rejected", error.message),
    );
  },
  send: (group, event, text) => client.send(BigInt(group), event, encode(text)),
  tell: (event, text) => client.tell(event, encode(text)),
  again: () => client.on("expired", ({ unconfirmed }) => {
    for (const { group, event, data } of unconfirmed) client.send(group, event, data);
  }),
  session: () => say("session", client.session),
  suspend: () => say("session", client.suspend()),
  close: () => client.close(),
};

process.on("uncaughtException", (error) => say("uncaught", error.message));

for await (const line of createInterface({ input: process.stdin })) {
  const [name, ...values] = JSON.parse(line);
  try {
    commands[name](...values);
  } catch (error) {
    say("raised", `${error.name}: ${error.message}`);
  }
}
process.exit(0);
