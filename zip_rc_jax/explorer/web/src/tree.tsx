// The tree over steps: a lane for every prefix, or its P(correct) as height.
import { useMemo, useRef, useState } from "preact/hooks";
import { Chart, type Drawn, Plot } from "./chart";
import { type Course, courseOf, type EventKind, number, type Occurrence, type Search, type Segment, trackOf } from "./data";

const SYMBOLS: Record<EventKind, { symbol: string; word: string }> = {
  start: { symbol: "diamond", word: "starts" },
  fork: { symbol: "triangle", word: "forks" },
  pause: { symbol: "square", word: "pauses" },
  resume: { symbol: "plus", word: "resumes" },
  end: { symbol: "circle", word: "ends" },
  answer: { symbol: "star", word: "is the answer" },
  left: { symbol: "times", word: "is left unfinished" },
  failed: { symbol: "asterisk", word: "fails" },
};

const MOST_PARTS = 400; // of a lane

// Live segments cut where predictions after every token are known.
function parts(search: Search, course: Course): Segment[] {
  const most = Math.max(1, Math.ceil(course.last / MOST_PARTS));
  return course.segments.flatMap((segment) => {
    const prefix = search.prefixes.find((one) => one.id === segment.prefix)!;
    const track = segment.live && prefix.tokens ? trackOf(search, prefix) : null;
    const decision = search.trace.find((one) => one.step === segment.from);
    if (!track || !decision) return [segment];
    const column = decision.prefix_ids.indexOf(segment.prefix);
    const first = column < 0 ? prefix.fork_position : decision.tokens[column];
    const cut: Segment[] = [];
    let before = first ? track.p[first - 1] : segment.p;
    for (let step = segment.from; step < segment.to; step += most) {
      const to = Math.min(segment.to, step + most);
      const token = Math.min(first + to - segment.from, track.p.length) - 1;
      const read = token >= 0 ? track.p[token] : segment.end;
      const end = Number.isNaN(read) ? before : read;
      cut.push({ ...segment, from: step, to, p: before, end });
      before = end;
    }
    return cut;
  });
}

interface Props {
  search: Search;
  decision: number;
  selected: number;
  onPick: (decision: number, prefix: number) => void;
  compact?: boolean;
}

export function Tree({ search, decision, selected, onPick, compact }: Props) {
  const [high, setHigh] = useState(false);
  const cursor = useRef<HTMLDivElement>(null);
  const scale = useRef<((step: number) => number) | null>(null);
  const course = useMemo(() => courseOf(search), [search, search.trace.length, search.usage.serial_steps]);
  const cut = useMemo(() => parts(search, course), [course]);
  const shown = search.prefixes.filter((p) => course.segments.some((s) => s.prefix === p.id));
  const lanes = shown.map((p) => p.id);
  const height = high ? 320 : 62 + 26 * Math.max(2, lanes.length);
  const step = search.trace[decision]?.step ?? 0;
  const place = () => {
    if (cursor.current && scale.current) cursor.current.style.left = `${scale.current(step)}px`;
  };
  place();
  const words = course.events.map(
    (e) => `step ${e.step}: ${e.prefix} ${SYMBOLS[e.kind].word}${e.kind === "fork" ? ` from ${e.parent}` : ""}`,
  );
  const kinds = [...new Set(course.events.map((e) => e.kind))];
  return (
    <section class="card" aria-label="Tree of the search">
      <div class="row">
        <h2>Tree</h2>
        <div class="choice" role="group" aria-label="Height of a line">
          <button type="button" aria-pressed={!high} onClick={() => setHigh(false)}>
            lanes
          </button>
          <button type="button" aria-pressed={high} onClick={() => setHigh(true)}>
            P(correct)
          </button>
        </div>
      </div>
      <div class="tree">
        <Chart
          label={`${lanes.length} prefixes over ${course.last} steps. ${words.slice(0, 60).join(". ")}`}
          height={height}
          deps={[search, course, high, selected, compact]}
          least={compact ? 240 : 320}
          draw={(width, palette) => {
            const y = (s: { prefix: number; p: number }) => (high ? s.p : s.prefix);
            const color = (s: Segment) => (Number.isNaN(s.end) ? s.p : s.end);
            const forks = course.events.filter((e) => e.kind === "fork" && lanes.includes(e.parent));
            return {
              marginLeft: compact ? 40 : 58,
              marginRight: 20,
              marginBottom: 36,
              x: { domain: [0, course.last], label: "serial steps", ticks: Math.min(10, width / 90), tickFormat: ",d" },
              y: high
                ? { domain: [0, 1], label: "P(correct)", grid: true, ticks: 5 }
                : { type: "band", domain: lanes, label: "prefix", padding: 0.3, tickSize: 0 },
              color: {
                type: "linear",
                domain: [0, 0.5, 1],
                range: [palette.low, palette.middle, palette.high],
                interpolate: "rgb",
                legend: !compact,
                label: "P(correct)",
                width: 200,
                marginLeft: 12,
                marginRight: 12,
                ticks: 3,
              },
              marks: [
                high ? null : Plot.barX(lanes.filter((id) => id === selected), { x1: 0, x2: course.last, y: (d) => d, fill: palette.soft, fillOpacity: 0.16, insetTop: -4, insetBottom: -4 }),
                Plot.link(forks, {
                  x: "step",
                  y1: (e) => (high ? e.p : e.parent),
                  y2: (e) => (high ? e.p : e.prefix),
                  stroke: palette.soft,
                  strokeWidth: 1.5,
                }),
                Plot.link(cut, {
                  filter: (s) => !s.live && !Number.isNaN(s.p),
                  x1: "from",
                  x2: "to",
                  y1: y,
                  y2: (s) => (high ? s.end : s.prefix),
                  stroke: palette.soft,
                  strokeWidth: 1.5,
                  strokeDasharray: "2 3",
                }),
                Plot.link(cut, {
                  // A model without a head says nothing.
                  filter: (s) => s.live && !high && Number.isNaN(s.p) && Number.isNaN(s.end),
                  x1: "from",
                  x2: "to",
                  y1: "prefix",
                  y2: "prefix",
                  stroke: palette.soft,
                  strokeWidth: 8,
                  strokeLinecap: "butt",
                }),
                Plot.link(cut, {
                  filter: (s) => s.live,
                  x1: "from",
                  x2: "to",
                  y1: y,
                  y2: (s) => (high ? s.end : s.prefix),
                  stroke: color,
                  strokeWidth: (s) => (high ? (s.prefix === selected ? 4 : 2) : 8),
                  strokeLinecap: "butt",
                }),
                Plot.dot(course.events, {
                  x: "step",
                  y,
                  symbol: (e: Occurrence) => SYMBOLS[e.kind].symbol,
                  r: (e: Occurrence) => (e.kind === "answer" ? 7 : 4.5),
                  fill: "var(--card)",
                  stroke: "var(--fg)",
                  strokeWidth: 1.6,
                  title: (e) =>
                    `step ${e.step}: prefix ${e.prefix} ${SYMBOLS[e.kind as EventKind].word}, P(correct) ${number(e.p)}`,
                }),
              ],
              symbol: { type: "identity" },
              r: { type: "identity" },
            };
          }}
          onDrawn={(drawn: Drawn) => {
            const x = drawn.scale("x")!;
            const figure = drawn.tagName === "FIGURE" ? drawn.querySelector(":scope > svg:last-of-type")! : drawn;
            scale.current = (at) => x.apply(at) as number;
            place();
            const lane = drawn.scale("y")!;
            figure.addEventListener("click", (event) => {
              const box = figure.getBoundingClientRect();
              const at = x.invert!((event as MouseEvent).clientX - box.left) as number;
              let best = 0;
              search.trace.forEach((d, i) => {
                if (d.step <= at + 0.5) best = i;
              });
              let prefix = selected;
              if (!high) {
                const down = (event as MouseEvent).clientY - box.top;
                prefix = lanes.reduce(
                  (a, b) => {
                    const far = (id: number) => Math.abs((lane.apply(id) as number) + (lane.bandwidth ?? 0) / 2 - down);
                    return far(b) < far(a) ? b : a;
                  },
                  lanes[0] ?? 0,
                );
              }
              onPick(best, prefix);
            });
            cursor.current!.style.height = `${figure.clientHeight - 36}px`;
            cursor.current!.style.bottom = "36px";
          }}
        />
        <div class="cursor" ref={cursor} aria-hidden="true" />
      </div>
      <p class="legend" aria-hidden="true">
        {kinds.map((kind) => (
          <span key={kind}>
            <Sign symbol={SYMBOLS[kind].symbol} /> {kind === "left" ? "left unfinished" : kind}
          </span>
        ))}
        <span>
          <i class="dashed" /> paused
        </span>
      </p>
      {compact ? null : (
        <details>
          <summary>The same as text: {course.events.length} events</summary>
          <ol class="events">
            {words.map((line, i) => (
              <li key={i}>{line}</li>
            ))}
          </ol>
        </details>
      )}
    </section>
  );
}

const PATHS: Record<string, string> = {
  diamond: "M0,-5L4,0L0,5L-4,0Z",
  triangle: "M0,-5L4.5,4L-4.5,4Z",
  square: "M-4,-4H4V4H-4Z",
  plus: "M-5,0H5M0,-5V5",
  circle: "M4.5,0A4.5,4.5,0,1,1,-4.5,0A4.5,4.5,0,1,1,4.5,0",
  star: "M0,-6L1.5,-2L5.7,-1.8L2.4,0.8L3.5,4.9L0,2.6L-3.5,4.9L-2.4,0.8L-5.7,-1.8L-1.5,-2Z",
  times: "M-4,-4L4,4M-4,4L4,-4",
  asterisk: "M0,-5V5M-4.3,-2.5L4.3,2.5M-4.3,2.5L4.3,-2.5",
};

function Sign({ symbol }: { symbol: string }) {
  return (
    <svg width="14" height="14" viewBox="-7 -7 14 14">
      <path d={PATHS[symbol]} fill="none" stroke="currentColor" stroke-width="1.6" />
    </svg>
  );
}
