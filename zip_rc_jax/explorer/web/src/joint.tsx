// The joint at one token as a heat map, and predicted against true remaining length.
import { Chart, Plot } from "./chart";
import { type Grid, jointAt, number, type Prefix, rootJoint, type Search, trackOf } from "./data";

function lengthNames(grid: Grid): string[] {
  const edges = grid.length_edges;
  return edges.slice(0, -1).map((edge, i) => (i === edges.length - 2 ? `${edge}+` : i === 0 ? `<${edges[1]}` : `${edge}`));
}

interface Props {
  search: Search;
  prefix: Prefix | undefined;
  token: number; // index into the track; -1 takes the joint of the decision
  decision: number;
}

export function JointPanel({ search, prefix, token, decision }: Props) {
  const grid = search.grid;
  const track = prefix ? trackOf(search, prefix) : null;
  let joint = jointAt(track, token, grid);
  let where = joint && prefix ? `prefix ${prefix.id} after token ${track!.at[token]}` : "";
  const piece = joint ? track!.pieces[token] : "";
  if (!joint && prefix) {
    const d = search.trace[decision];
    const column = d ? d.prefix_ids.indexOf(prefix.id) : -1;
    joint = (column >= 0 && d.joints?.[column]) || null;
    where = joint ? `prefix ${prefix.id} at decision ${decision + 1}` : "";
  }
  if (!joint && prefix && search.trace[decision] && !search.trace[decision].tokens[prefix.id]) {
    joint = rootJoint(search);
    where = joint ? "after the question" : "";
  }
  if (!grid || !joint) {
    return (
      <section class="card" aria-label="Joint">
        <h2>Joint</h2>
        <p class="note">
          {track || search.grid
            ? "Point at a token to see the joint after it."
            : "The joints were not recorded. zip-rc decode --introspect records them."}
        </p>
      </section>
    );
  }
  const names = lengthNames(grid);
  const cells = joint.flatMap((row, b) => row.map((p, l) => ({ reward: grid.reward_centres[b], length: names[l], p })));
  const top = Math.max(...cells.map((cell) => cell.p), 1e-9);
  const value = cells.reduce((sum, cell) => sum + cell.p * cell.reward, 0);
  const remaining = joint.reduce(
    (sum, row) => sum + row.reduce((a, p, l) => a + (p * (grid.length_edges[l] + grid.length_edges[l + 1])) / 2, 0),
    0,
  );
  return (
    <section class="card" aria-label="Joint">
      <h2>Joint</h2>
      <p class="note">
        {where}
        {piece ? (
          <>
            {" "}
            <code class="piece">{piece}</code>
          </>
        ) : null}
        : P(correct) {number(value)}, {number(remaining, 1)} tokens remain. Probabilities in percent.
      </p>
      <Chart
        label={`Joint of final reward and remaining length, ${where}: P(correct) ${number(value)}, ${number(remaining, 1)} tokens remain`}
        height={64 + 30 * grid.reward_centres.length}
        deps={[search, prefix?.id, token, decision, joint]}
        least={260}
        draw={(_, palette) => ({
          marginLeft: 52,
          marginBottom: 38,
          x: { type: "band", domain: names, label: "remaining tokens", padding: 0.04, tickSize: 0 },
          y: { type: "band", domain: [...grid.reward_centres].reverse(), label: "final reward", padding: 0.04, tickSize: 0, tickFormat: (v: number) => `${+v.toFixed(3)}` },
          color: { type: "linear", domain: [0, top / 2, top], range: palette.heat, interpolate: "rgb" },
          marks: [
            Plot.cell(cells, { x: "length", y: "reward", fill: "p", title: (c) => `reward ${c.reward}, ${c.length} tokens: ${(100 * c.p).toFixed(2)}%` }),
            Plot.text(cells, {
              filter: (c) => c.p >= 0.005,
              x: "length",
              y: "reward",
              text: (c) => (100 * c.p).toFixed(0),
              fill: (c) => (c.p > top * 0.55 ? "var(--on-strong)" : "var(--fg)"),
              pointerEvents: "none",
            }),
          ],
        })}
      />
    </section>
  );
}

const MOST_POINTS = 1000;

export function RemainingPanel({ search, prefix, token }: { search: Search; prefix: Prefix | undefined; token: number }) {
  const track = prefix ? trackOf(search, prefix) : null;
  if (!prefix || !track || track.pieces.length < 2) return null;
  const length = track.pieces.length;
  const ended = prefix.state === "finished" && prefix.finish_reason === "stop";
  const every = Math.max(1, Math.ceil(track.pieces.length / MOST_POINTS));
  const points: { at: number; tokens: number; kind: string }[] = [];
  for (let i = 0; i < length; i += every) {
    points.push({ at: track.at[i], tokens: track.remaining[i], kind: "predicted" });
    if (ended) points.push({ at: track.at[i], tokens: prefix.length - track.at[i], kind: "true" });
  }
  let error = 0;
  let read = 0;
  for (let i = 0; i < length; i++) {
    if (Number.isNaN(track.remaining[i])) continue;
    error += Math.abs(track.remaining[i] - (prefix.length - track.at[i]));
    read++;
  }
  error /= Math.max(1, read);
  const said = ended
    ? `mean absolute error ${number(error, 1)} tokens`
    : prefix.state === "finished"
      ? "cut off, so its true length is not known"
      : "not finished, so its true length is not known";
  return (
    <section class="card" aria-label="Remaining length">
      <h2>Remaining length</h2>
      <p class="note">
        prefix {prefix.id}: {said}
      </p>
      <Chart
        label={`Predicted and true remaining tokens along prefix ${prefix.id}: ${said}`}
        height={220}
        deps={[search, prefix.id, track.pieces.length, token]}
        least={260}
        draw={(_, palette) => ({
          marginLeft: 48,
          x: { label: "tokens written", tickFormat: ",d", ticks: 6 },
          y: { label: "remaining tokens", grid: true, zero: true, ticks: 5 },
          color: {
            domain: ended ? ["predicted", "true"] : ["predicted"],
            range: palette.series.slice(0, 2),
            legend: true,
          },
          marks: [
            Plot.line(points, { x: "at", y: "tokens", stroke: "kind", z: "kind", strokeWidth: 2 }),
            token >= 0 ? Plot.ruleX([track.at[token]], { stroke: "var(--fg)", strokeDasharray: "3 3" }) : null,
          ],
        })}
      />
    </section>
  );
}
