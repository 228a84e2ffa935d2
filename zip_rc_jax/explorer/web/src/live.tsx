// Ask the server that shows this page, and watch it decide.
import { useRef, useState } from "preact/hooks";
import type { Actions, Data, Decision, Grid, Live, Search, Track } from "./data";
import { SearchView } from "./search";

interface Step {
  decision: Decision;
  actions: Actions | null;
  new_text: Record<string, string>;
}

function empty(prompt: string): Search {
  return {
    run: -1,
    problem: -1,
    prompt,
    text: "",
    prefix_id: -1,
    finish_reason: "",
    expected_reward: null,
    error: "",
    usage: { prompt_tokens: 0, tokens: 0, serial_steps: 0, seconds: 0 },
    settings: null,
    grid: null,
    root: null,
    prefixes: [],
    trace: [],
    live: true,
  };
}

// A growing track: every piece is what an interval wrote, read at the decision behind it.
interface Growing extends Track {
  pieces: string[];
  p: number[];
  remaining: number[];
  at: number[];
  cells: number[];
}

function growing(): Growing {
  return { pieces: [], p: [], remaining: [], at: [], cells: [], scale: 1, shared: 0 };
}

// Where each prefix that follows a decision was forked from: copies of every prefix in order, then
// new samples.
function parentsAfter(decision: Decision | undefined): { parent: number; fork: number }[] {
  if (!decision) return [];
  const born: { parent: number; fork: number }[] = [];
  decision.prefix_ids.forEach((id, i) => {
    if (id < 0 || decision.finished[i]) return;
    for (let k = 1; k < decision.multiplicity[i]; k++) born.push({ parent: id, fork: decision.tokens[i] });
  });
  return born;
}

// The search with one more decision. What the head says after every token is not sent, so a text is
// colored by intervals.
export function grown(before: Search, step: Step): Search {
  const decision: Decision = { ...step.decision, actions: step.actions };
  const prefixes = before.prefixes.map((p) => ({ ...p }));
  const born = parentsAfter(before.trace[before.trace.length - 1]);
  const known = prefixes.length;
  decision.prefix_ids.forEach((id, i) => {
    if (id < 0) return;
    let text = step.new_text[String(id)] ?? "";
    if (!prefixes[id]) {
      const from = before.trace.length ? born[id - known] : undefined;
      const track = growing();
      const above = from ? before.prefixes[from.parent] : undefined;
      if (above) {
        Object.assign(track, structuredClone(above.track));
        track.shared = track.pieces.length;
        if (text.startsWith(above.text)) text = text.slice(above.text.length);
      }
      prefixes[id] = {
        id,
        parent: from?.parent ?? -1,
        fork_position: from?.fork ?? 0,
        text: above?.text ?? "",
        length: from?.fork ?? 0,
        state: "live",
        finish_reason: "",
        expected_reward: null,
        expected_remaining: null,
        track,
      };
    }
    const prefix = prefixes[id];
    const track = prefix.track as Growing;
    if (text || decision.tokens[i] > prefix.length) {
      const joint = decision.joints?.[i];
      prefix.track = {
        ...track,
        pieces: [...track.pieces, text],
        p: [...track.p, decision.expected_reward[i] ?? NaN],
        remaining: [...track.remaining, decision.expected_remaining[i] ?? NaN],
        at: [...track.at, decision.tokens[i]],
        cells: [...track.cells, ...(joint ? joint.flat() : [])],
      } as Growing;
    }
    prefix.text += text;
    prefix.length = decision.tokens[i];
    prefix.expected_reward = decision.expected_reward[i];
    prefix.expected_remaining = decision.expected_remaining[i];
    prefix.state = decision.finished[i] ? "finished" : decision.multiplicity[i] ? "live" : "paused";
  });
  const tokens = prefixes.reduce((n, p) => n + p.length - p.fork_position, 0);
  const usage = { ...before.usage, serial_steps: decision.step, tokens };
  const trace = [...before.trace, decision];
  const best = Math.max(...decision.expected_reward.map((x) => x ?? 0));
  return { ...before, prefixes, usage, trace, expected_reward: best };
}

interface Tree {
  text: string;
  prefix_id: number;
  finish_reason: string;
  expected_reward: number | null;
  error: string;
  usage: Search["usage"];
  prefixes: { id: number; parent: number; fork_position: number; text: string; token_ids: number[]; state: string; finish_reason: string; expected_reward: number | null; expected_remaining: number | null }[];
}

function finished(before: Search, tree: Tree): Search {
  const prefixes = tree.prefixes.map((p) => ({
    ...(before.prefixes[p.id] ?? { track: growing() }),
    id: p.id,
    parent: p.parent,
    fork_position: p.fork_position,
    text: p.text,
    length: p.token_ids.length,
    state: p.state,
    finish_reason: p.finish_reason,
    expected_reward: p.expected_reward,
    expected_remaining: p.expected_remaining,
  }));
  return { ...before, prefixes, text: tree.text, prefix_id: tree.prefix_id, finish_reason: tree.finish_reason, expected_reward: tree.expected_reward, error: tree.error, usage: tree.usage, live: false };
}

async function* lines(response: Response): AsyncGenerator<string> {
  const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const parts = rest.split("\n\n");
    rest = parts.pop()!;
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}

export function LiveView({ data, live }: { data: Data; live: Live }) {
  const [question, setQuestion] = useState("");
  const [n, setN] = useState(live.options.n);
  const [alpha, setAlpha] = useState(live.options.alpha);
  const [beta, setBeta] = useState(live.options.beta);
  const [strategy, setStrategy] = useState(live.options.strategies[0] ?? "zip");
  const [most, setMost] = useState(live.options.max_tokens);
  const [seed, setSeed] = useState("0");
  const [chat, setChat] = useState(live.chat);
  const [key, setKey] = useState("");
  const [search, setSearch] = useState<Search | null>(null);
  const [running, setRunning] = useState(false);
  const [problem, setProblem] = useState("");
  const stop = useRef<AbortController | null>(null);
  const ask = async () => {
    const control = new AbortController();
    stop.current?.abort();
    stop.current = control;
    setProblem("");
    setRunning(true);
    let now = empty(question);
    setSearch(now);
    try {
      const asked = strategy === "default" ? {} : { strategy };
      const fields = { n, alpha, beta, ...asked, introspect: true, return_tree: true };
      const common = { model: live.model, stream: true, max_tokens: most, zip_rc: fields, ...(seed.trim() ? { seed: Number(seed) } : {}) };
      const body = chat ? { ...common, messages: [{ role: "user", content: question }] } : { ...common, prompt: question };
      const response = await fetch(chat ? "v1/chat/completions" : "v1/completions", {
        method: "POST",
        signal: control.signal,
        headers: { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) },
        body: JSON.stringify(body),
      });
      if (!response.ok) {
        const said = await response.json().catch(() => null);
        throw new Error(said?.error?.message ?? `status ${response.status}`);
      }
      for await (const line of lines(response)) {
        if (line === "[DONE]") break;
        const chunk = JSON.parse(line);
        if (chunk.error) throw new Error(chunk.error.message);
        const said = chunk.zip_rc;
        if (!said) continue;
        if (said.introspection) {
          const grid: Grid = said.introspection.grid ?? now.grid;
          now = grown({ ...now, grid, settings: said.introspection.settings ?? now.settings }, said.introspection);
        }
        if (said.tree) now = finished(now, said.tree);
        setSearch(now);
      }
    } catch (error) {
      if (!control.signal.aborted) setProblem(error instanceof Error ? error.message : String(error));
    } finally {
      if (stop.current === control) setRunning(false);
      setSearch((last) => (last ? { ...last, live: false } : last));
    }
  };
  const figure = (name: string, value: number, set: (x: number) => void, least: number, top: number, step: number) => (
    <label class="figure">
      {name}
      <input type="range" min={least} max={top} step={step} value={value} aria-label={name} onInput={(e) => set(Number(e.currentTarget.value))} />
      <input type="number" min={least} max={top} step="any" value={value} aria-label={`${name}, exactly`} onChange={(e) => set(Number(e.currentTarget.value))} />
    </label>
  );
  return (
    <div class="live">
      <form
        class="card"
        aria-label="Ask"
        onSubmit={(event) => {
          event.preventDefault();
          if (question.trim()) void ask();
        }}
      >
        <div class="row">
          <h2>Ask {live.model}</h2>
          {live.calibration ? <span class="note">{live.calibration}</span> : null}
        </div>
        <textarea
          rows={3}
          value={question}
          aria-label="Question"
          placeholder="A question for the model. Ctrl+Enter asks it."
          onInput={(e) => setQuestion(e.currentTarget.value)}
          onKeyDown={(e) => {
            if (e.key === "Enter" && (e.ctrlKey || e.metaKey) && question.trim()) {
              e.preventDefault();
              void ask();
            }
          }}
        />
        <div class="figures">
          {figure("alpha", alpha, setAlpha, 0, 1, 0.05)}
          {figure("beta", beta, setBeta, 0, 0.5, 0.005)}
          {figure("n", n, setN, 1, live.options.n, 1)}
        </div>
        <p class="note">
          alpha weighs compute (1) against latency (0). beta is the price of one mean sample, in reward: higher is thriftier.
        </p>
        <div class="row">
          <label>
            strategy{" "}
            <select value={strategy} onChange={(e) => setStrategy(e.currentTarget.value)}>
              {live.options.strategies.map((name) => (
                <option key={name}>{name}</option>
              ))}
            </select>
          </label>
          <label>
            max_tokens <input type="number" min={1} max={live.options.max_tokens} value={most} onChange={(e) => setMost(Number(e.currentTarget.value))} />
          </label>
          <label>
            seed <input type="text" inputMode="numeric" size={6} value={seed} onInput={(e) => setSeed(e.currentTarget.value)} />
          </label>
          <label>
            <input type="checkbox" checked={chat} disabled={!live.chat} onChange={(e) => setChat(e.currentTarget.checked)} /> chat template
          </label>
          {live.key ? (
            <label>
              API key <input type="password" autocomplete="off" value={key} onInput={(e) => setKey(e.currentTarget.value)} />
            </label>
          ) : null}
          <span class="end">
            {running ? (
              <button type="button" onClick={() => stop.current?.abort()}>
                Stop
              </button>
            ) : null}
            <button type="submit" class="main" disabled={!question.trim()}>
              Ask
            </button>
          </span>
        </div>
        {problem ? (
          <p class="problem" role="alert">
            {problem}
          </p>
        ) : null}
      </form>
      {search ? <SearchView data={data} search={search} follow={running} /> : null}
    </div>
  );
}
