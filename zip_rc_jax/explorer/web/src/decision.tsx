// One decision: what was done with every prefix, and what every other action was worth.
import { useState } from "preact/hooks";
import {
  type Actions,
  actionName,
  actionText,
  type Decision,
  number,
  prefixName,
  ROOT,
  type Search,
  signed,
} from "./data";

// The best action that treats one prefix otherwise and leaves all others as they are.
export function instead(actions: Actions | null | undefined, column: number): number {
  if (!actions) return -1;
  const taken = actions.multiplicity[0];
  let best = -1;
  actions.multiplicity.forEach((row, i) => {
    if (!i || row[column] === taken[column]) return;
    if (row.some((copies, k) => k !== column && copies !== taken[k])) return;
    const better = best < 0 || (actions.utility[i] ?? -Infinity) > (actions.utility[best] ?? -Infinity);
    if (better) best = i;
  });
  return best;
}

function difference(a: number | null, b: number | null): number | null {
  return a === null || b === null ? null : a - b;
}

// "Why was 3 paused?" in numbers.
export function why(decision: Decision, column: number): string {
  const id = decision.prefix_ids[column];
  const done = decision.finished[column];
  const action = actionName(id, decision.multiplicity[column], done);
  const name = id === ROOT ? "New samples" : `Prefix ${id}`;
  if (done) return `${name} has finished. It counts for the reward and costs nothing more.`;
  const actions = decision.actions;
  if (!actions) return `${name}: ${action}. The actions that were weighed were not recorded.`;
  const other = instead(actions, column);
  if (other < 0) return `${name}: ${action}. No other action differs in it alone.`;
  const otherwise = actionName(id, actions.multiplicity[other][column], false);
  if (actions.utility[other] === null) {
    return `${name}: ${action}. With ${otherwise} instead the search would end without any answer, which is not allowed.`;
  }
  const gain = difference(actions.value[other], actions.value[0]);
  const compute = difference(actions.compute[other], actions.compute[0]);
  const latency = difference(actions.latency[other], actions.latency[0]);
  const change = difference(actions.utility[other], actions.utility[0]);
  const verdict = (change ?? 0) > 0 ? "a higher utility, which the search did not look at" : (change ?? 0) < 0 ? "so it is worth less" : "so both are worth the same";
  return (
    `${name}: ${action}. With ${otherwise} instead, the expected best reward changes by ${signed(gain, 4)}, ` +
    `compute by ${signed(compute, 1)} tokens and latency by ${signed(latency, 1)}, ` +
    `and the utility by ${signed(change, 4)}: ${verdict}.`
  );
}

interface Props {
  search: Search;
  index: number;
  selected: number;
  onSelect: (prefix: number) => void;
}

export function DecisionPanel({ search, index, selected, onSelect }: Props) {
  const [all, setAll] = useState(false);
  const decision = search.trace[index];
  if (!decision) return <section class="card" aria-label="Decision"><h2>Decision</h2><p class="note">No decision yet.</p></section>;
  const actions = decision.actions;
  const settings = search.settings ?? {};
  const column = Math.max(0, decision.prefix_ids.indexOf(selected));
  const edges = search.grid?.length_edges;
  const pause = (bin: number) => (bin < 0 ? "none" : edges ? `${edges[bin]} tokens` : `bin ${bin}`);
  const exponent = Number(settings.selection_exponent ?? 1);
  const worth = exponent === 1 ? "E[max]" : "value";
  const rows = decision.prefix_ids
    .map((id, i) => ({ id, i }))
    .filter(({ id, i }) => id === ROOT || decision.tokens[i] > 0 || decision.multiplicity[i] > 0 || instead(actions, i) >= 0);
  // Prefixes that have not begun are all alike: one stands for them.
  const idle = rows.filter(({ id, i }) => id !== ROOT && !decision.tokens[i] && !decision.multiplicity[i]);
  const listed = rows.filter((row) => !idle.includes(row) || row === idle[0]);
  const most = all ? Infinity : 12;
  return (
    <section class="card" aria-label="Decision">
      <div class="row">
        <h2>
          Decision {index + 1} of {search.trace.length}
        </h2>
        <span class="note">
          step {decision.step}, utility {number(decision.utility, 4)}, planned pause after: {pause(decision.planned_pause_bin)}
        </span>
      </div>
      {actions ? (
        <p class="sum">
          U = {worth} − β (α · compute + (1 − α) · latency) / N = {number(actions.value[0], 4)} − {String(settings.beta ?? "β")} (
          {String(settings.alpha ?? "α")} · {number(actions.compute[0], 1)} + {number(1 - Number(settings.alpha ?? 0), 2)} ·{" "}
          {number(actions.latency[0], 1)}) / {number(actions.normalizer, 1)} = {number(actions.utility[0], 4)}
        </p>
      ) : (
        <p class="note">
          The actions that were weighed were not recorded. <code>zip-rc decode --introspect</code> records them.
        </p>
      )}
      <p class="why" role="status">
        {why(decision, column)}
      </p>
      <div class="wide" tabIndex={0} role="region" aria-label="Prefixes at this decision">
        <table>
          <caption>Prefixes, and what the opposite would change</caption>
          <thead>
            <tr>
              <th class="text">prefix</th>
              <th>P(correct)</th>
              <th>remaining</th>
              <th>tokens</th>
              <th class="text">action</th>
              {actions ? (
                <>
                  <th class="text">instead</th>
                  <th>{worth}</th>
                  <th>compute</th>
                  <th>latency</th>
                  <th>utility</th>
                </>
              ) : null}
            </tr>
          </thead>
          <tbody>
            {listed.map(({ id, i }) => {
              const other = instead(actions, i);
              const a = actions!;
              const done = decision.finished[i];
              const like = idle.length > 1 && id === idle[0].id ? ` to ${idle[idle.length - 1].id}` : "";
              return (
                <tr key={id} class={id === selected ? "selected" : ""} onClick={() => onSelect(id)}>
                  <th scope="row" class="text">
                    <button type="button" class="link" onClick={() => onSelect(id)}>
                      {id === ROOT ? "new sample" : `${id}${like}`}
                    </button>
                  </th>
                  <td>{number(decision.expected_reward[i])}</td>
                  <td>{number(decision.expected_remaining[i], 1)}</td>
                  <td>{decision.tokens[i]}</td>
                  <td class="text">{like && !decision.multiplicity[i] ? "not begun" : actionName(id, decision.multiplicity[i], done)}</td>
                  {actions && other >= 0 ? (
                    <>
                      <td class="text">{actionName(id, a.multiplicity[other][i], false)}</td>
                      <td>{signed(difference(a.value[other], a.value[0]), 4)}</td>
                      <td>{signed(difference(a.compute[other], a.compute[0]), 1)}</td>
                      <td>{signed(difference(a.latency[other], a.latency[0]), 1)}</td>
                      <td>{a.utility[other] === null ? "not allowed" : signed(difference(a.utility[other], a.utility[0]), 4)}</td>
                    </>
                  ) : actions ? (
                    <td colSpan={5} class="text soft">
                      {done ? "costs nothing more" : ""}
                    </td>
                  ) : null}
                </tr>
              );
            })}
          </tbody>
        </table>
      </div>
      {actions ? (
        <div class="wide" tabIndex={0} role="region" aria-label="Actions that were weighed">
          <table>
            <caption>
              Actions, the best first
              {actions.count ? ` (${actions.count} compared)` : ""}
            </caption>
            <thead>
              <tr>
                <th class="text">extends</th>
                <th>{worth}</th>
                <th>compute</th>
                <th>latency</th>
                <th>utility</th>
                <th>pause after</th>
                <th class="text">why listed</th>
              </tr>
            </thead>
            <tbody>
              {actions.multiplicity.slice(0, most).map((row, i) => (
                <tr key={i} class={i === 0 ? "taken" : ""}>
                  <th scope="row" class="text">
                    {actionText(decision, row)}
                  </th>
                  <td>{number(actions.value[i], 4)}</td>
                  <td>{number(actions.compute[i], 1)}</td>
                  <td>{number(actions.latency[i], 1)}</td>
                  <td>{actions.utility[i] === null ? "not allowed" : number(actions.utility[i], 4)}</td>
                  <td>{pause(actions.planned_pause_bin[i])}</td>
                  <td class="text soft">{i === 0 ? "taken" : actions.compared[i] ? "compared" : "one change"}</td>
                </tr>
              ))}
            </tbody>
          </table>
          {actions.multiplicity.length > 12 ? (
            <button type="button" onClick={() => setAll(!all)}>
              {all ? "Show the best 12" : `Show all ${actions.multiplicity.length}`}
            </button>
          ) : null}
        </div>
      ) : null}
      <p class="note">
        {prefixName(selected)} is selected. Compute and latency are expected tokens; differences are against the taken action.
      </p>
    </section>
  );
}
