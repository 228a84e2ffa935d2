// What the page is given, and how packed arrays are read. The writer is zip_rc_jax/explorer.

export interface Grid {
  reward_centres: number[];
  length_edges: number[];
}

export interface Actions {
  multiplicity: number[][];
  planned_pause_bin: number[];
  value: (number | null)[];
  compute: (number | null)[];
  latency: (number | null)[];
  utility: (number | null)[];
  compared: number[];
  count: number;
  normalizer: number;
}

export interface Decision {
  step: number;
  prefix_ids: number[];
  multiplicity: number[];
  planned_pause_bin: number;
  utility: number | null;
  expected_reward: (number | null)[];
  expected_remaining: (number | null)[];
  tokens: number[];
  finished: boolean[];
  actions?: Actions | null;
  joints?: number[][][] | null;
}

export interface Packed {
  pieces: string[];
  p_correct: string;
  remaining: string;
  joint: string;
}

export interface Prefix {
  id: number;
  parent: number;
  fork_position: number;
  text: string;
  length: number;
  state: string;
  finish_reason: string;
  expected_reward: number | null;
  expected_remaining: number | null;
  tokens?: Packed | null;
  track?: Track;
}

export interface Search {
  run: number;
  problem: number;
  prompt: string;
  text: string;
  prefix_id: number;
  finish_reason: string;
  expected_reward: number | null;
  error: string;
  usage: { prompt_tokens: number; tokens: number; serial_steps: number; seconds: number };
  settings: Record<string, unknown> | null;
  grid: Grid | null;
  root: Packed | null;
  prefixes: Prefix[];
  trace: Decision[];
  live?: boolean;
}

export interface Run {
  name: string;
  series: string;
  kind: "search" | "baseline" | "other";
  alpha: number | null;
  beta: number | null;
  correct: (number | null)[];
  compute: number[];
  latency: number[];
  p: (number | null)[] | null;
}

export interface Problem {
  prompt: string;
  answer: string | null;
  level: string | null;
}

export interface Bin {
  predicted: number;
  observed: number;
  count: number;
}

export interface Table {
  title: string;
  columns: string[];
  rows: string[][];
  note: string;
  text_columns: number;
}

export interface Live {
  model: string;
  chat: boolean;
  key: boolean;
  calibration: string;
  options: { n: number; alpha: number; beta: number; max_tokens: number; strategies: string[] };
}

export interface Data {
  version: number;
  title: string;
  unit: "tokens" | "samples";
  alphas: number[];
  headline: { run: number; baseline: number } | null;
  runs: Run[];
  problems: Problem[];
  searches: Search[];
  reward_bins: Bin[];
  length_bins: Bin[];
  about: [string, string][];
  settings: string;
  tables: Table[];
  images: { title: string; source: string }[];
  links: { title: string; href: string }[];
  notes: string[];
  live: Live | null;
}

// Predictions along the text of one prefix: entry i is read after piece i.
export interface Track {
  pieces: string[];
  p: ArrayLike<number>;
  remaining: ArrayLike<number>;
  at: ArrayLike<number>; // tokens of the prefix, up to the piece
  cells: ArrayLike<number> | null; // joints, one behind another
  scale: number; // that a cell is divided by
  shared: number; // pieces that belong to the parent
}

function bytes(text: string): ArrayBuffer {
  const raw = atob(text);
  const read = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) read[i] = raw.charCodeAt(i);
  return read.buffer;
}

const CELL = 65535;

// The track of a prefix with the tokens that it shares with its parents, read once.
export function trackOf(search: Search, prefix: Prefix): Track | null {
  if (prefix.track) return prefix.track;
  const own = prefix.tokens;
  if (!own) return null;
  const p = new Float32Array(bytes(own.p_correct));
  const remaining = new Float32Array(bytes(own.remaining));
  const cells = new Uint16Array(bytes(own.joint));
  const parent = search.prefixes.find((other) => other.id === prefix.parent);
  const above = parent && prefix.fork_position ? trackOf(search, parent) : null;
  const shared = above ? prefix.fork_position : 0;
  const track: Track = { pieces: own.pieces, p, remaining, at: [], cells, scale: CELL, shared };
  if (above) {
    const size = cells.length / Math.max(1, p.length);
    track.pieces = [...above.pieces.slice(0, shared), ...own.pieces];
    track.p = joined(Float32Array, above.p, shared, p);
    track.remaining = joined(Float32Array, above.remaining, shared, remaining);
    track.cells = joined(Uint16Array, above.cells!, shared * size, cells);
  }
  track.at = Array.from(track.pieces, (_, i) => i + 1);
  prefix.track = track;
  return track;
}

function joined<T extends Float32Array | Uint16Array>(
  kind: new (length: number) => T,
  first: ArrayLike<number>,
  count: number,
  second: ArrayLike<number>,
): T {
  const all = new kind(count + second.length);
  for (let i = 0; i < count; i++) all[i] = first[i];
  all.set(second, count);
  return all;
}

// The joint after piece i, as rows of rewards; null where it is not known.
export function jointAt(track: Track | null, i: number, grid: Grid | null): number[][] | null {
  if (!track?.cells || !grid || i < 0 || Number.isNaN(track.p[i])) return null;
  const width = grid.length_edges.length - 1;
  const size = grid.reward_centres.length * width;
  const cells = Array.from({ length: size }, (_, c) => track.cells![i * size + c] / track.scale);
  return grid.reward_centres.map((_, b) => cells.slice(b * width, (b + 1) * width));
}

// The joint after the prompt.
export function rootJoint(search: Search): number[][] | null {
  const root = search.root;
  if (!root) return null;
  const cells = new Uint16Array(bytes(root.joint));
  return jointAt({ pieces: [], p: [], remaining: [], at: [], cells, scale: CELL, shared: 0 }, 0, search.grid);
}

// ---- the course of a search

export interface Segment {
  prefix: number;
  from: number;
  to: number;
  p: number;
  end: number; // P(correct) at its end
  live: boolean;
}

export type EventKind = "start" | "fork" | "pause" | "resume" | "end" | "answer" | "left" | "failed";

export interface Occurrence {
  kind: EventKind;
  prefix: number;
  step: number;
  p: number;
  parent: number;
}

export const ROOT = -1;

export function columnOf(decision: Decision, prefix: number): number {
  return decision.prefix_ids.indexOf(prefix);
}

export interface Course {
  segments: Segment[];
  events: Occurrence[];
  last: number;
}

// Where every prefix ran, rested and ended. Between two decisions a live prefix adds tokens, one a
// step; where it ended before the interval did, its line ends there.
export function courseOf(search: Search): Course {
  const segments: Segment[] = [];
  const events: Occurrence[] = [];
  const trace = search.trace;
  const last = Math.max(search.usage.serial_steps, ...trace.map((d) => d.step), 1);
  for (const prefix of search.prefixes) {
    let begun = prefix.parent >= 0 ? prefix.fork_position : 0;
    let started = false;
    let resting = false;
    let ended = false;
    for (let i = 0; i < trace.length && !ended; i++) {
      const decision = trace[i];
      const column = columnOf(decision, prefix.id);
      const p = column < 0 ? NaN : (decision.expected_reward[column] ?? NaN);
      const tokens = column < 0 ? begun : decision.tokens[column];
      const next = trace[i + 1];
      const after = next ? columnOf(next, prefix.id) : -1;
      const grown = next && after >= 0 ? next.tokens[after] : !next ? prefix.length : tokens;
      const until = next ? next.step : last;
      if (column >= 0 && decision.finished[column]) {
        ended = true;
        break;
      }
      if (grown > tokens) {
        const to = next ? Math.min(until, decision.step + grown - tokens) : until;
        const end = next && after >= 0 ? (next.expected_reward[after] ?? NaN) : (prefix.expected_reward ?? NaN);
        const first = Number.isNaN(p) ? parentP(decision, prefix.parent, end) : p;
        if (!started) {
          const kind = prefix.parent >= 0 ? "fork" : "start";
          events.push({ kind, prefix: prefix.id, step: decision.step, p: first, parent: prefix.parent });
        } else if (resting) {
          events.push({ kind: "resume", prefix: prefix.id, step: decision.step, p: first, parent: ROOT });
        }
        started = true;
        resting = false;
        segments.push({ prefix: prefix.id, from: decision.step, to, p: first, end, live: true });
        const done = next && after >= 0 && next.finished[after];
        if (done || (!next && prefix.state === "finished")) {
          const kind = prefix.id === search.prefix_id ? "answer" : "end";
          events.push({ kind, prefix: prefix.id, step: to, p: end, parent: ROOT });
          ended = true;
        } else if (prefix.state === "failed" && grown === prefix.length) {
          events.push({ kind: "failed", prefix: prefix.id, step: to, p: end, parent: ROOT });
        }
        begun = grown;
      } else if (started && column >= 0) {
        if (!resting && decision.multiplicity[column] === 0) {
          const kind = next ? "pause" : "left";
          events.push({ kind, prefix: prefix.id, step: decision.step, p, parent: ROOT });
        }
        resting = true;
        if (until > decision.step) {
          segments.push({ prefix: prefix.id, from: decision.step, to: until, p, end: p, live: false });
        }
      }
    }
  }
  events.sort((a, b) => a.step - b.step || a.prefix - b.prefix);
  return { segments, events, last };
}

function parentP(decision: Decision, parent: number, otherwise: number): number {
  const column = columnOf(decision, parent);
  return column < 0 ? otherwise : (decision.expected_reward[column] ?? otherwise);
}

// How many tokens a prefix had at a decision.
export function tokensAt(search: Search, prefix: Prefix, decision: number): number {
  const d = search.trace[decision];
  if (!d) return prefix.length;
  const column = columnOf(d, prefix.id);
  return column < 0 ? 0 : d.tokens[column];
}

// ---- words and numbers

export function number(x: number | null | undefined, digits = 2): string {
  return x === null || x === undefined || !Number.isFinite(x) ? "–" : x.toFixed(digits);
}

export function signed(x: number | null | undefined, digits = 3): string {
  if (x === null || x === undefined || !Number.isFinite(x)) return "–";
  const text = Math.abs(x).toFixed(digits);
  if (Number(text) === 0) return text;
  return (x < 0 ? "−" : "+") + text;
}

export function mean(values: (number | null)[]): number {
  const known = values.filter((x): x is number => x !== null && Number.isFinite(x));
  return known.length ? known.reduce((a, b) => a + b, 0) / known.length : NaN;
}

export function prefixName(id: number): string {
  return id === ROOT ? "new sample" : `prefix ${id}`;
}

export function actionName(id: number, copies: number, finished: boolean): string {
  if (finished) return copies ? "finished" : "dropped";
  if (id === ROOT) return copies ? `start ${copies}` : "start none";
  return copies === 0 ? "pause" : copies === 1 ? "continue" : `fork into ${copies}`;
}

// "0 2 4×2 +1": what an action extends.
export function actionText(decision: Decision, row: number[]): string {
  const parts: string[] = [];
  decision.prefix_ids.forEach((id, i) => {
    if (decision.finished[i] || !row[i]) return;
    parts.push(id === ROOT ? `+${row[i]} new` : row[i] > 1 ? `${id}×${row[i]}` : `${id}`);
  });
  return parts.length ? parts.join(" ") : "stop";
}
