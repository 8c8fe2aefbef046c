// The page of the chat: rooms, who is in them, and what is said.
//
// What it shows is kept together with the session while the page is reloaded, so that what comes
// after it fits what is there: nothing is missing, and nothing is there twice.

import { DomiClient } from "./client.js";

const [JOIN, MESSAGE, LEFT, HISTORY, PEOPLE] = [50, 51, 52, 53, 54];
const KEPT = "domi-chat";
const AGAIN = 500; // milliseconds before a room is tried again
const SHOWN = 200; // lines of a room

const $ = (id) => document.getElementById(id);
const bytes = (value) => new TextEncoder().encode(JSON.stringify(value));
const value = (data) => JSON.parse(new TextDecoder().decode(data));

let client = null;
let name = "";
let current = "";
/** By name: {group, joined, lost, lines, people, zone, pid, unread}. */
const rooms = new Map();
const byGroup = new Map();

// ------------------------------------------------------------------------------------ rooms

/** The same id for a name in every page: the beginning of its SHA-256. */
async function groupOf(room) {
  const hash = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(room));
  return new DataView(hash).getBigUint64(0, true);
}

async function addRoom(room, kept = {}) {
  if (rooms.has(room)) return;
  const group = await groupOf(room);
  const lists = { lines: [], people: [], unread: 0, ...kept };
  rooms.set(room, { ...lists, group, joined: false, lost: false });
  byGroup.set(group, room);
}

function join(room) {
  if (client.connected && rooms.has(room)) send(room, JOIN, { room });
}

function send(room, event, data) {
  try {
    client.send(rooms.get(room).group, event, bytes(data));
    return true;
  } catch (error) {
    notice(room, `Not sent: ${error.message}`);
    return false;
  }
}

function leaveRoom(room) {
  send(room, LEFT, {});
  byGroup.delete(rooms.get(room).group);
  rooms.delete(room);
  current = rooms.keys().next().value ?? "";
  show();
}

function notice(room, text) {
  const found = rooms.get(room);
  if (!found) return;
  found.lines.push({ notice: text });
  if (room === current) show();
}

// ------------------------------------------------------------------------------------ connection

/** @param {string | null} session of this page before it was reloaded. */
async function connect(session) {
  const urls = await (await fetch("gateways")).json();
  const first = Number(new URLSearchParams(location.search).get("gateway")) || 0;
  const order = [...urls.slice(first), ...urls.slice(0, first)];
  const named = () => `gateway ${urls.indexOf(client.gateway)}`;
  client = new DomiClient(order, { credentials: name, session });

  client.on("welcome", () => {
    badge("connected", `Connected to ${named()}`);
    for (const room of rooms.keys()) join(room);
  });
  client.on("resumed", () => {
    badge("resumed", `Resumed at ${named()}`);
    for (const [room, { joined }] of rooms) if (!joined) join(room);
  });
  client.on("away", () => badge("away", "Away, connecting again …"));
  client.on("expired", ({ reason, unconfirmed }) => {
    for (const room of rooms.keys()) {
      rooms.get(room).joined = false;
      notice(room, `The session is over (${reason}); joining again`);
    }
    for (const { group, event, data } of unconfirmed) {
      if (event === MESSAGE) notice(byGroup.get(group), `Perhaps not sent: ${value(data).text}`);
    }
  });
  client.on("lost", ({ group, reason }) => {
    const room = byGroup.get(group);
    if (room === undefined) return;
    Object.assign(rooms.get(room), { joined: false, lost: true });
    notice(room, `The room was lost (${reason}); joining again`);
    badge("lost", "Room lost, joining again …");
    join(room);
  });
  client.on("refused", ({ group, event, reason }) => {
    const room = byGroup.get(group);
    if (room === undefined) return;
    if (event === JOIN) setTimeout(() => rooms.get(room)?.joined || join(room), AGAIN);
    if (event === MESSAGE) notice(room, `Not sent: ${reason}`);
  });
  client.on("closed", ({ code, reason }) => {
    badge("closed", `Disconnected: ${reason || code}`);
    if (code === 4001) enterAgain(reason);
    show();
  });
  client.on(HISTORY, (data) => {
    const { room, lines, zone, pid } = value(data);
    const found = rooms.get(room);
    if (!found) return;
    const again = found.lost;
    Object.assign(found, { joined: true, lost: false, lines, zone, pid });
    if (again) badge("connected", `Connected to ${named()}`);
    show();
  });
  client.on(MESSAGE, (data) => {
    const line = value(data);
    const found = rooms.get(line.room);
    if (!found) return;
    found.lines = [...found.lines, line].slice(-SHOWN);
    if (line.room !== current || document.hidden) found.unread += 1;
    show();
  });
  client.on(PEOPLE, (data) => {
    const { room, people } = value(data);
    const found = rooms.get(room);
    if (found) found.people = people;
    show();
  });

  badge("connecting", "Connecting …");
  $("welcome").hidden = true;
  $("app").hidden = false;
  show();
  await client.connect().catch(() => {}); // "closed" says it
}

/** The session and what is shown, for the page that follows. */
function keep() {
  if (!client) return;
  const session = client.suspend();
  const kept = [...rooms].map(([room, { joined, lines, people, zone, pid, unread }]) => {
    return [room, { joined, lines, people, zone, pid, unread }];
  });
  sessionStorage.setItem(KEPT, JSON.stringify({ session, name, current, rooms: kept }));
}

/** What a page before has kept; for one only, so that a copy of the tab gets nothing. */
function take() {
  const kept = sessionStorage.getItem(KEPT);
  sessionStorage.removeItem(KEPT);
  return kept && JSON.parse(kept);
}

function leave() {
  client.close();
  client = null;
  rooms.clear();
  byGroup.clear();
  enterAgain("");
}

function enterAgain(problem) {
  $("app").hidden = true;
  $("welcome").hidden = false;
  $("problem").textContent = problem;
  $("name").value = name;
}

// ------------------------------------------------------------------------------------ what is seen

function badge(state, text) {
  $("badge").dataset.state = state;
  $("badge").textContent = text;
}

function element(tag, text, className) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

function lineElement({ notice, user, name, text, time, number }) {
  if (notice) return element("li", notice, "notice");
  const made = element("li", "", user === String(client.user) ? "mine" : "");
  made.dataset.number = number;
  const when = new Date(time * 1000);
  const clock = element("time", when.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" }));
  clock.dateTime = when.toISOString();
  const head = element("div", "", "head");
  head.append(element("span", name, "name"), clock);
  made.append(head, element("div", text, "text"));
  return made;
}

function roomElement([room, { unread }]) {
  const made = element("li", "");
  const button = element("button", "");
  button.type = "button";
  button.setAttribute("aria-current", String(room === current));
  button.append(element("span", `# ${room}`));
  if (unread && room !== current) button.append(element("span", String(unread), "count"));
  button.onclick = () => select(room);
  made.append(button);
  return made;
}

function personElement({ user, name, away }) {
  const you = client && user === String(client.user) ? " (you)" : "";
  return element("li", `${name}${you}${away ? ", away" : ""}`, away ? "away" : "");
}

function show() {
  if (!client) return;
  const room = rooms.get(current);
  $("me").textContent = name;
  document.body.dataset.user = String(client.user ?? "");
  $("rooms").replaceChildren(...[...rooms].map(roomElement));
  $("title").textContent = current;
  $("zone").textContent = room?.joined ? `held by zone ${room.zone}, process ${room.pid}` : "";
  $("zone").dataset.pid = room?.joined ? room.pid : "";
  $("people").replaceChildren(...(room?.people ?? []).map(personElement));
  $("text").disabled = $("say").querySelector("button").disabled = !room?.joined;
  const lines = $("lines");
  const atEnd = lines.scrollHeight - lines.scrollTop - lines.clientHeight < 40;
  lines.replaceChildren(...(room?.lines ?? []).map(lineElement));
  if (atEnd) lines.scrollTop = lines.scrollHeight;
}

function select(room) {
  current = room;
  rooms.get(room).unread = 0;
  show();
  $("lines").scrollTop = $("lines").scrollHeight;
  $("text").focus();
}

// ------------------------------------------------------------------------------------ what is done

$("enter").onsubmit = async (event) => {
  event.preventDefault();
  name = $("name").value.trim();
  current = $("first").value.trim().toLowerCase();
  await addRoom(current);
  await connect(null);
};

$("join").onsubmit = async (event) => {
  event.preventDefault();
  const room = $("room").value.trim().toLowerCase();
  $("room").value = "";
  if (!room) return;
  const isNew = !rooms.has(room);
  await addRoom(room);
  if (isNew) join(room);
  select(room);
};

$("say").onsubmit = (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (text && send(current, MESSAGE, { text })) $("text").value = "";
};

$("out").onclick = () => (rooms.size > 1 ? leaveRoom(current) : leave());
$("out").title = "Leave this room";

addEventListener("pagehide", keep);
addEventListener("pageshow", async ({ persisted }) => {
  const kept = take();
  if (persisted) {
    client?.connect().catch(() => {});
    return;
  }
  if (!kept) return;
  ({ name, current } = kept);
  for (const [room, { joined, ...lists }] of kept.rooms) {
    await addRoom(room, lists);
    rooms.get(room).joined = joined;
  }
  await connect(kept.session);
});
