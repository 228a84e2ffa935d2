// Accuracy against cost, calibration, and the problems behind them.
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { Chart, Plot, pressable } from "./chart";
import { type Bin, type Data, mean, number, type Run, signed } from "./data";
import { SearchView } from "./search";

const SYMBOLS = ["circle", "square", "triangle", "diamond", "star", "times", "plus", "wye"];
const FIRST_ROWS = 500;

export function costOf(run: Run, i: number, alpha: number): number {
  return alpha * run.compute[i] + (1 - alpha) * run.latency[i];
}

function accuracyOf(run: Run, i: number): number | null {
  return run.correct[i];
}

interface Point {
  run: number;
  name: string;
  series: string;
  cost: number;
  accuracy: number;
}

// A little more than what the values span, so that no point lies on the edge.
function around(values: number[], top = Infinity): [number, number] {
  const least = Math.min(...values);
  const most = Math.max(...values);
  const room = (most - least) * 0.06 || Math.max(0.05, Math.abs(most) * 0.1);
  return values.length ? [least - room, Math.min(most + room, top)] : [0, 1];
}

function belongs(run: Run, alpha: number): boolean {
  return run.kind !== "search" || run.alpha === null || Math.abs(run.alpha - alpha) < 1e-9;
}

interface Props {
  data: Data;
  open: (search: number) => void;
}

export function EvaluationView({ data, open }: Props) {
  const alphas = data.alphas.length ? data.alphas : [0.5];
  const [alpha, setAlpha] = useState(data.headline ? (data.runs[data.headline.run].alpha ?? alphas[0]) : alphas[0]);
  const graded = data.runs.some((run) => run.correct.some((x) => x !== null));
  const [first, setFirst] = useState(data.headline?.run ?? 0);
  const [second, setSecond] = useState(data.headline?.baseline ?? Math.min(1, data.runs.length - 1));
  const [level, setLevel] = useState("");
  const [chosen, setChosen] = useState<number | null>(null);
  const levels = useMemo(
    () => [...new Set(data.problems.map((p) => p.level).filter((x): x is string => x !== null))].sort(),
    [data],
  );
  const here = useMemo(
    () => data.problems.map((_, i) => i).filter((i) => !level || data.problems[i].level === level),
    [data, level],
  );
  const measure = (run: Run, i: number) => (graded ? accuracyOf(run, i) : (run.p?.[i] ?? null));
  const points = useMemo(
    () =>
      data.runs.flatMap((run, index): Point[] => {
        if (!belongs(run, alpha)) return [];
        const mine = here.filter((i) => measure(run, i) !== null);
        if (!mine.length) return [];
        return [
          {
            run: index,
            name: run.name,
            series: run.series,
            cost: mean(mine.map((i) => costOf(run, i, alpha))),
            accuracy: mean(mine.map((i) => measure(run, i))),
          },
        ];
      }),
    [data, alpha, here],
  );
  const series = [...new Set(points.map((p) => p.series))];
  const word = graded ? "accuracy" : "mean P(correct)";
  const unit = data.unit === "samples" ? "GenCost (one mean sample is 1)" : "α · tokens + (1 − α) · steps";
  const pick = (index: number) => {
    if (chosen !== null && chosen !== index) setSecond(chosen === first ? first : second);
    setChosen(index);
    setFirst(index);
  };
  return (
    <div class="evaluation">
      <section class="card" aria-label="Accuracy against cost">
        <div class="row">
          <h2>{graded ? "Accuracy" : "P(correct)"} against cost</h2>
          <label>
            alpha{" "}
            <select value={alpha} onChange={(e) => setAlpha(Number(e.currentTarget.value))}>
              {alphas.map((a) => (
                <option key={a} value={a}>
                  {a}
                </option>
              ))}
            </select>
          </label>
          {levels.length > 1 ? (
            <label>
              level{" "}
              <select value={level} onChange={(e) => setLevel(e.currentTarget.value)}>
                <option value="">all</option>
                {levels.map((name) => (
                  <option key={name}>{name}</option>
                ))}
              </select>
            </label>
          ) : null}
          <span class="note">A point opens its problems below.</span>
        </div>
        <Chart
          label={`${word} against cost at alpha ${alpha}: ${points.length} points of ${series.length} methods`}
          height={420}
          deps={[points, first, second]}
          draw={(width, palette) => {
            return {
              marginLeft: 48,
              marginRight: 24,
              marginTop: 26,
              marginBottom: 40,
              x: { label: unit, grid: true, domain: around(points.map((p) => p.cost)), ticks: width / 90 },
              y: {
                label: word,
                grid: true,
                domain: around(points.map((p) => p.accuracy), 1.01),
                tickFormat: (v: number) => `${+(100 * v).toFixed(1)}%`,
              },
              color: {
                domain: series,
                range: series.map((_, i) => palette.series[i % palette.series.length]),
              },
              symbol: { domain: series, range: series.map((_, i) => SYMBOLS[i % SYMBOLS.length]), legend: true },
              marks: [
                Plot.line(points, {
                  filter: (p) => data.runs[p.run].kind !== "other",
                  x: "cost",
                  y: "accuracy",
                  z: "series",
                  stroke: "series",
                  strokeWidth: 1.5,
                  sort: "cost",
                  strokeOpacity: 0.75,
                }),
                Plot.dot(points, {
                  filter: (p) => p.run === first || p.run === second,
                  x: "cost",
                  y: "accuracy",
                  r: 11,
                  stroke: "var(--fg)",
                  strokeWidth: 1.5,
                }),
                Plot.text(points, {
                  filter: (p) => p.run === first || p.run === second,
                  x: "cost",
                  y: "accuracy",
                  text: (p) => (p.run === first ? "A" : "B"),
                  dy: -18,
                  fontWeight: "bold",
                  fill: "var(--fg)",
                }),
                Plot.dot(points, {
                  x: "cost",
                  y: "accuracy",
                  stroke: "series",
                  fill: "var(--card)",
                  symbol: "series",
                  r: 5,
                  strokeWidth: 2,
                  title: (p) => `${p.name}: ${word} ${(100 * p.accuracy).toFixed(1)}%, cost ${number(p.cost)}`,
                  render: pressable(
                    (i) =>
                      `${points[i].name}: ${word} ${(100 * points[i].accuracy).toFixed(1)}%, cost ${number(points[i].cost)}. Opens its problems.`,
                    (i) => {
                      pick(points[i].run);
                      document.getElementById("problems")?.scrollIntoView({ block: "start" });
                    },
                  ),
                }),
              ],
            };
          }}
        />
      </section>
      <Calibration data={data} />
      <Problems
        data={data}
        alpha={alpha}
        level={level}
        first={first}
        second={second}
        setFirst={setFirst}
        setSecond={setSecond}
        graded={graded}
        open={open}
      />
    </div>
  );
}

function Calibration({ data }: { data: Data }) {
  if (!data.reward_bins.length && !data.length_bins.length) return null;
  const most = Math.max(...data.length_bins.flatMap((b) => [b.predicted, b.observed]), 1);
  const said = (bins: Bin[]) =>
    bins.map((b) => `predicted ${number(b.predicted)}, observed ${number(b.observed)}`).join("; ");
  const draw =
    (bins: Bin[], end: number, x: string, y: string, series: number): Parameters<typeof Chart>[0]["draw"] =>
    (_, palette) => ({
      marginLeft: 48,
      marginBottom: 38,
      x: { domain: [0, end], label: x, grid: true, ticks: 5 },
      y: { domain: [0, end], label: y, grid: true, ticks: 5 },
      r: { range: [2, 10] },
      marks: [
        Plot.link([0], { x1: 0, y1: 0, x2: end, y2: end, stroke: palette.soft, strokeDasharray: "3 3" }),
        Plot.line(bins, { x: "predicted", y: "observed", stroke: palette.series[series], strokeWidth: 1.5 }),
        Plot.dot(bins, {
          x: "predicted",
          y: "observed",
          r: "count",
          fill: palette.series[series],
          fillOpacity: 0.7,
          title: (b) => `predicted ${number(b.predicted, 3)}, observed ${number(b.observed, 3)}, ${b.count} items`,
        }),
      ],
    });
  return (
    <section class="card" aria-label="Calibration">
      <div class="row">
        <h2>Calibration</h2>
        <span class="note">On the dotted line, what is predicted is what happens. The area of a dot is the number of items.</span>
      </div>
      <div class="pair">
        {data.reward_bins.length ? (
          <Chart
            label={`Calibration of P(correct): ${said(data.reward_bins)}`}
            height={280}
            deps={[data]}
            draw={draw(data.reward_bins, 1, "predicted P(correct)", "share correct", 0)}
          />
        ) : null}
        {data.length_bins.length ? (
          <Chart
            label={`Calibration of the remaining length: ${said(data.length_bins)}`}
            height={280}
            deps={[data]}
            draw={draw(data.length_bins, most * 1.04, "predicted remaining tokens", "true remaining tokens", 1)}
          />
        ) : null}
      </div>
    </section>
  );
}

type Outcome = "all" | "lost" | "won" | "both" | "neither";
type Column = "number" | "problem" | "level" | "a" | "b" | "difference" | "costa" | "costb" | "saved";

interface ProblemsProps {
  data: Data;
  alpha: number;
  level: string;
  first: number;
  second: number;
  setFirst: (run: number) => void;
  setSecond: (run: number) => void;
  graded: boolean;
  open: (search: number) => void;
}

function Problems(props: ProblemsProps) {
  const { data, alpha, level, first, second, setFirst, setSecond, graded, open } = props;
  const [words, setWords] = useState("");
  const [outcome, setOutcome] = useState<Outcome>("all");
  const [column, setColumn] = useState<Column>("number");
  const [down, setDown] = useState(false);
  const [most, setMost] = useState(FIRST_ROWS);
  const [side, setSide] = useState<number | null>(null);
  const beside = useRef<HTMLDivElement>(null);
  useEffect(() => beside.current?.scrollIntoView({ block: "start" }), [side]);
  const a = data.runs[first];
  const b = data.runs[second];
  const measure = (run: Run, i: number) => (graded ? run.correct[i] : (run.p?.[i] ?? null));
  const rows = useMemo(() => {
    const needle = words.trim().toLowerCase();
    const found = data.problems.flatMap((problem, i) => {
      if (level && problem.level !== level) return [];
      if (needle && !problem.prompt.toLowerCase().includes(needle)) return [];
      const mine = measure(a, i);
      const theirs = measure(b, i);
      if (mine === null && theirs === null) return [];
      const difference = mine === null || theirs === null ? null : mine - theirs;
      const kept: Record<Outcome, boolean> = {
        all: true,
        lost: difference !== null && difference < -1e-9,
        won: difference !== null && difference > 1e-9,
        both: (mine ?? 0) >= 0.5 && (theirs ?? 0) >= 0.5,
        neither: (mine ?? 1) < 0.5 && (theirs ?? 1) < 0.5,
      };
      if (!kept[outcome]) return [];
      const costa = mine === null ? NaN : costOf(a, i, alpha);
      const costb = theirs === null ? NaN : costOf(b, i, alpha);
      return [{ number: i, problem: problem.prompt, level: problem.level ?? "", a: mine ?? NaN, b: theirs ?? NaN, difference: difference ?? NaN, costa, costb, saved: costb - costa }];
    });
    const sign = down ? -1 : 1;
    return found.sort((x, y) => {
      const l = x[column];
      const r = y[column];
      if (typeof l === "string") return sign * l.localeCompare(r as string) || x.number - y.number;
      if (Number.isNaN(l) || Number.isNaN(r as number)) return Number(Number.isNaN(l)) - Number(Number.isNaN(r as number));
      return sign * (l - (r as number)) || x.number - y.number;
    });
  }, [data, alpha, level, first, second, words, outcome, column, down]);
  const searches = useMemo(() => {
    const found = new Map<string, number>();
    data.searches.forEach((search, i) => found.set(`${search.run} ${search.problem}`, i));
    return found;
  }, [data]);
  const treeOf = (run: number, problem: number) => searches.get(`${run} ${problem}`);
  const head = (name: Column, title: string, text = false) => (
    <th class={text ? "text" : ""} aria-sort={column === name ? (down ? "descending" : "ascending") : "none"}>
      <button
        type="button"
        class="link"
        onClick={() => {
          setDown(column === name ? !down : name !== "number" && name !== "problem" && name !== "level" && name !== "difference");
          setColumn(name);
        }}
      >
        {title}
        {column === name ? (down ? " ▾" : " ▴") : ""}
      </button>
    </th>
  );
  const both = rows.filter((row) => !Number.isNaN(row.difference));
  const won = both.filter((row) => row.difference > 1e-9).length;
  const lost = both.filter((row) => row.difference < -1e-9).length;
  const chooser = (value: number, set: (run: number) => void, name: string) => (
    <label>
      {name}{" "}
      <select value={value} onChange={(e) => set(Number(e.currentTarget.value))}>
        {data.runs.map((run, i) => (
          <option key={i} value={i}>
            {run.name}
          </option>
        ))}
      </select>
    </label>
  );
  const word = graded ? "accuracy" : "P(correct)";
  const shownTrees = side === null ? [] : [first, second].map((run) => treeOf(run, side));
  return (
    <section class="card" aria-label="Problems" id="problems">
      <div class="row">
        <h2>Problems</h2>
        {chooser(first, setFirst, "A")}
        {chooser(second, setSecond, "B")}
        <button
          type="button"
          onClick={() => {
            setFirst(second);
            setSecond(first);
          }}
        >
          swap
        </button>
      </div>
      <div class="row">
        <label>
          show{" "}
          <select value={outcome} onChange={(e) => setOutcome(e.currentTarget.value as Outcome)}>
            <option value="all">all problems</option>
            <option value="lost">where A lost against B</option>
            <option value="won">where A won against B</option>
            <option value="neither">where neither is right</option>
            <option value="both">where both are right</option>
          </select>
        </label>
        <label>
          with the words{" "}
          <input type="search" value={words} onInput={(e) => setWords(e.currentTarget.value)} />
        </label>
      </div>
      <p class="note" role="status">
        {rows.length} problems. A: {word} {number(100 * mean(both.map((r) => r.a)), 1)}%, cost {number(mean(both.map((r) => r.costa)))}. B:{" "}
        {word} {number(100 * mean(both.map((r) => r.b)), 1)}%, cost {number(mean(both.map((r) => r.costb)))}. A is better on {won}, worse
        on {lost}.
      </p>
      <div class="wide tall" tabIndex={0} role="region" aria-label="Table of problems">
        <table class="problems">
          <thead>
            <tr>
              {head("number", "#")}
              {head("problem", "problem", true)}
              {data.problems.some((p) => p.level) ? head("level", "level", true) : null}
              {head("a", `A ${word}`)}
              {head("b", `B ${word}`)}
              {head("difference", "A − B")}
              {head("costa", "A cost")}
              {head("costb", "B cost")}
              {head("saved", "saved")}
            </tr>
          </thead>
          <tbody>
            {rows.slice(0, most).map((row) => {
              const mine = treeOf(first, row.number);
              const theirs = treeOf(second, row.number);
              return (
                <tr key={row.number} class={row.difference < -1e-9 ? "lost" : row.difference > 1e-9 ? "won" : ""}>
                  <td>{row.number}</td>
                  <td class="text long">
                    {mine !== undefined || theirs !== undefined ? (
                      <button
                        type="button"
                        class="link"
                        onClick={() => (mine !== undefined && theirs !== undefined && mine !== theirs ? setSide(row.number) : open((mine ?? theirs)!))}
                      >
                        {row.problem}
                      </button>
                    ) : (
                      row.problem
                    )}
                  </td>
                  {data.problems.some((p) => p.level) ? <td class="text">{row.level}</td> : null}
                  <td>{number(row.a)}</td>
                  <td>{number(row.b)}</td>
                  <td>{signed(row.difference, 2)}</td>
                  <td>{number(row.costa)}</td>
                  <td>{number(row.costb)}</td>
                  <td>{signed(row.saved, 2)}</td>
                </tr>
              );
            })}
          </tbody>
        </table>
      </div>
      {rows.length > most ? (
        <button type="button" onClick={() => setMost(most + FIRST_ROWS)}>
          Show {Math.min(FIRST_ROWS, rows.length - most)} more
        </button>
      ) : null}
      {side !== null ? (
        <div class="sides" role="region" aria-label="Two runs side by side" ref={beside}>
          <div class="row">
            <h2>Problem {side}, side by side</h2>
            <button type="button" onClick={() => setSide(null)}>
              close
            </button>
          </div>
          <div class="pair">
            {shownTrees.map((at, k) => (
              <div key={k}>
                <p class="row">
                  <b>
                    {k ? "B" : "A"}: {data.runs[k ? second : first].name}
                  </b>
                  {at === undefined ? null : (
                    <button type="button" onClick={() => open(at)}>
                      open
                    </button>
                  )}
                </p>
                {at === undefined ? (
                  <p class="note">Its tree was not kept.</p>
                ) : (
                  <SearchView data={data} search={data.searches[at]} compact />
                )}
              </div>
            ))}
          </div>
        </div>
      ) : null}
    </section>
  );
}
