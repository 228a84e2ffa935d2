// One search: tree, scrubber, decision, joint and texts.
import { useEffect, useRef, useState } from "preact/hooks";
import { type Data, number, type Search, tokensAt, trackOf } from "./data";
import { DecisionPanel } from "./decision";
import { JointPanel, RemainingPanel } from "./joint";
import { type Mode, Texts } from "./texts";
import { Tree } from "./tree";

function outcome(data: Data, search: Search): string {
  const right = data.runs[search.run]?.correct[search.problem];
  return right === null || right === undefined ? "" : right >= 0.5 ? "right" : "wrong";
}

export function Summary({ data, search }: { data: Data; search: Search }) {
  const said = outcome(data, search);
  const reference = data.problems[search.problem]?.answer;
  return (
    <section class="card question" aria-label="Question and answer">
      <p class="prompt">{search.prompt}</p>
      <p class="answer">
        {search.error ? (
          <b>failed: {search.error}</b>
        ) : search.prefix_id < 0 && !search.text ? (
          <b>{search.live ? "searching" : "no answer"}</b>
        ) : (
          search.text
        )}
      </p>
      <p class="facts">
        {said ? <span class={`chip ${said}`}>{said === "right" ? "✓ right" : "✗ wrong"}</span> : null}
        {reference ? <span>reference {reference}</span> : null}
        <span>P(correct) {number(search.expected_reward)}</span>
        <span>{search.usage.tokens} tokens</span>
        <span>{search.usage.serial_steps} steps</span>
        <span>{search.trace.length} decisions</span>
        <span>ends by {search.finish_reason || "nothing yet"}</span>
      </p>
    </section>
  );
}

// Whether a key belongs to what has the focus.
function typing(event: KeyboardEvent): boolean {
  const target = event.target as HTMLElement;
  return target.closest("input, textarea, select, [contenteditable]") !== null;
}

interface Props {
  data: Data;
  search: Search;
  follow?: boolean;
  compact?: boolean;
}

export function SearchView({ data, search, follow, compact }: Props) {
  const [decision, setDecision] = useState(Math.max(0, search.trace.length - 1));
  const [selected, setSelected] = useState(Math.max(0, search.prefix_id));
  const [token, setToken] = useState(-1);
  const [fixed, setFixed] = useState(false);
  const [mode, setMode] = useState<Mode>("p");
  const [playing, setPlaying] = useState(false);
  const count = search.trace.length;
  const place = useRef<HTMLDivElement>(null);
  const current = follow ? count - 1 : Math.min(decision, count - 1);
  const prefix = search.prefixes.find((one) => one.id === selected);
  useEffect(() => {
    setDecision(Math.max(0, search.trace.length - 1));
    setSelected(Math.max(0, search.prefix_id));
    setToken(-1);
    setFixed(false);
    setPlaying(false);
  }, [search]);
  useEffect(() => {
    if (!playing) return;
    const timer = setInterval(() => {
      setDecision((now) => {
        if (now + 1 >= count) {
          setPlaying(false);
          return now;
        }
        return now + 1;
      });
    }, 700);
    return () => clearInterval(timer);
  }, [playing, count]);
  const begun = search.prefixes.filter((one) => one.length > 0).map((one) => one.id);
  const move = (by: number) => setDecision((now) => Math.max(0, Math.min(count - 1, now + by)));
  const select = (id: number) => {
    setSelected(id);
    setToken(-1);
    setFixed(false);
  };
  useEffect(() => {
    if (compact) return;
    const onKey = (event: KeyboardEvent) => {
      if (event.ctrlKey || event.metaKey || event.altKey || typing(event) || !place.current?.offsetParent) return;
      const track = prefix ? trackOf(search, prefix) : null;
      const token_by = (by: number) => {
        if (!track) return;
        setFixed(true);
        setToken((now) => Math.max(0, Math.min(track.pieces.length - 1, (now < 0 ? (by > 0 ? -1 : 0) : now) + by)));
      };
      const prefix_by = (by: number) => {
        const at = begun.indexOf(selected);
        if (begun.length) select(begun[Math.max(0, Math.min(begun.length - 1, at + by))]);
      };
      const acts: Record<string, () => void> = {
        ArrowLeft: () => (event.shiftKey ? token_by(-1) : move(-1)),
        ArrowRight: () => (event.shiftKey ? token_by(1) : move(1)),
        ArrowUp: () => prefix_by(-1),
        ArrowDown: () => prefix_by(1),
        k: () => prefix_by(-1),
        j: () => prefix_by(1),
        ",": () => token_by(-1),
        ".": () => token_by(1),
        Home: () => setDecision(0),
        End: () => setDecision(count - 1),
        p: () => setPlaying((now) => !now),
        Escape: () => {
          setToken(-1);
          setFixed(false);
        },
      };
      const act = acts[event.key];
      if (!act || (event.shiftKey && !event.key.startsWith("Arrow"))) return;
      // A widget that scrolls or holds a pressed key keeps it.
      if ((event.target as HTMLElement).closest("[role=tablist]")) return;
      event.preventDefault();
      act();
    };
    addEventListener("keydown", onKey);
    return () => removeEventListener("keydown", onKey);
  });
  const written = prefix ? tokensAt(search, prefix, current) : 0;
  const track = prefix ? trackOf(search, prefix) : null;
  let shown = token;
  if (shown < 0 && track) {
    // Without a pointer: the last token that was written at this decision.
    shown = -1;
    for (let i = 0; i < track.pieces.length && track.at[i] <= written; i++) shown = i;
  }
  const said = search.trace[current];
  return (
    <div class="search" ref={place}>
      <Summary data={data} search={search} />
      <Tree
        search={search}
        decision={current}
        selected={selected}
        compact={compact}
        onPick={(at, id) => {
          setDecision(at);
          select(id);
        }}
      />
      {count ? (
        <div class="scrubber">
          <button type="button" onClick={() => move(-1)} disabled={current <= 0} aria-label="Previous decision">
            ◀
          </button>
          {compact ? null : (
            <button type="button" onClick={() => setPlaying(!playing)} aria-pressed={playing}>
              {playing ? "pause" : "play"}
            </button>
          )}
          <button type="button" onClick={() => move(1)} disabled={current >= count - 1} aria-label="Next decision">
            ▶
          </button>
          <input
            type="range"
            min={0}
            max={Math.max(0, count - 1)}
            value={current}
            disabled={follow}
            aria-label="Decision"
            aria-valuetext={said ? `decision ${current + 1} of ${count}, step ${said.step}` : ""}
            onInput={(event) => setDecision(Number(event.currentTarget.value))}
          />
          <output>
            {current + 1} / {count}, step {said?.step}
          </output>
        </div>
      ) : null}
      {compact ? null : (
        <p class="note keys">
          Keys: ← → decision, ↑ ↓ or j k prefix, <kbd>,</kbd> <kbd>.</kbd> token, p play, Home End, Esc frees the token. A
          click on a token holds it{fixed && token >= 0 ? " (held now)" : ""}.
        </p>
      )}
      <div class="columns">
        <DecisionPanel search={search} index={current} selected={selected} onSelect={select} />
        {compact ? null : (
          <div class="side">
            <JointPanel search={search} prefix={prefix} token={shown} decision={current} />
            <RemainingPanel search={search} prefix={prefix} token={shown} />
          </div>
        )}
      </div>
      <Texts
        search={search}
        decision={current}
        mode={mode}
        setMode={setMode}
        selected={selected}
        cursor={token}
        onSelect={select}
        onPoint={(id, at, hold) => {
          if (!hold && fixed) return;
          setSelected(id);
          setToken(at);
          setFixed(hold && !(fixed && token === at && selected === id));
        }}
      />
    </div>
  );
}
