import { render } from "preact";
import { useEffect, useState } from "preact/hooks";
import type { Data, Search } from "./data";
import { EvaluationView } from "./evaluation";
import { LiveView } from "./live";
import { ReportView } from "./report";
import { SearchView } from "./search";
import { type Choice, choose, useTheme } from "./theme";

const VERSION = 1;

type Tab = "live" | "search" | "evaluation" | "report";
const NAMES: Record<Tab, string> = { live: "Live", search: "Search", evaluation: "Evaluation", report: "Report" };

function first(data: Data, tabs: Tab[]): [Tab, number] {
  const [tab, at] = location.hash.slice(1).split("=");
  const wanted = tabs.includes(tab as Tab) ? (tab as Tab) : tabs[0];
  const place = Number(at);
  return [wanted, Number.isInteger(place) && place >= 0 && place < data.searches.length ? place : 0];
}

function explained(search: Search): boolean {
  return search.trace.some((decision) => decision.actions);
}

function title(data: Data, search: Search, i: number): string {
  const runs = data.runs.length > 1 && data.runs[search.run] ? ` · ${data.runs[search.run].name}` : "";
  const right = data.runs[search.run]?.correct[search.problem];
  const mark = right === null || right === undefined ? "" : right >= 0.5 ? "✓ " : "✗ ";
  const text = search.prompt.replace(/\s+/g, " ");
  const short = text.length > 70 ? `…${text.slice(-69)}` : text;
  const some = data.searches.some(explained) && !data.searches.every(explained);
  return `${mark}${i}${runs}: ${short}${some && explained(search) ? " (explained)" : ""}`;
}

function App({ data }: { data: Data }) {
  const tabs: Tab[] = [];
  if (data.live) tabs.push("live");
  if (data.runs.length && data.problems.length > 1) tabs.push("evaluation");
  if (data.searches.length) tabs.push("search");
  if (data.tables.length || data.images.length || data.about.length || data.links.length) tabs.push("report");
  if (data.searches.length && !data.tables.length) tabs.sort((a, b) => Number(b === "search") - Number(a === "search"));
  const [[tab, at], go] = useState<[Tab, number]>(() => first(data, tabs));
  const [, choice] = useTheme();
  useEffect(() => {
    const onHash = () => go(first(data, tabs));
    addEventListener("hashchange", onHash);
    return () => removeEventListener("hashchange", onHash);
  }, []);
  useEffect(() => {
    history.replaceState(null, "", `#${tab}${tab === "search" ? `=${at}` : ""}`);
  }, [tab, at]);
  const show = (next: Tab, place = at) => {
    go([next, place]);
    scrollTo(0, 0);
  };
  return (
    <>
      <header>
        <h1>{data.title}</h1>
        {tabs.length > 1 ? (
          <div class="tabs" role="tablist" aria-label="Views">
            {tabs.map((name) => (
              <button
                type="button"
                role="tab"
                id={`tab-${name}`}
                key={name}
                aria-selected={tab === name}
                aria-controls={`view-${name}`}
                tabIndex={tab === name ? 0 : -1}
                onClick={() => show(name)}
                onKeyDown={(event) => {
                  const by = event.key === "ArrowRight" ? 1 : event.key === "ArrowLeft" ? -1 : 0;
                  if (!by) return;
                  const next = tabs[(tabs.indexOf(name) + by + tabs.length) % tabs.length];
                  show(next);
                  document.getElementById(`tab-${next}`)?.focus();
                }}
              >
                {NAMES[name]}
              </button>
            ))}
          </div>
        ) : null}
        <label class="theme">
          <span class="hidden">Colors</span>
          <select value={choice} aria-label="Colors" onChange={(event) => choose(event.currentTarget.value as Choice)}>
            <option value="auto">auto</option>
            <option value="light">light</option>
            <option value="dark">dark</option>
          </select>
        </label>
      </header>
      {data.notes.length ? (
        <div class="notes">
          {data.notes.map((note, i) => (
            <p class="note" key={i}>
              {note}
            </p>
          ))}
        </div>
      ) : null}
      <main>
        <div id={`view-${tab}`} {...(tabs.length > 1 ? { role: "tabpanel", "aria-labelledby": `tab-${tab}` } : {})}>
        {data.live ? (
          <div hidden={tab !== "live"}>
            <LiveView data={data} live={data.live} />
          </div>
        ) : null}
        {tab === "search" ? (
          <>
            {data.searches.length > 1 ? (
              <div class="row picker">
                <button type="button" disabled={at === 0} onClick={() => show("search", at - 1)} aria-label="Previous search">
                  ◀
                </button>
                <select value={at} aria-label="Search" onChange={(event) => show("search", Number(event.currentTarget.value))}>
                  {data.searches.map((search, i) => (
                    <option key={i} value={i}>
                      {title(data, search, i)}
                    </option>
                  ))}
                </select>
                <button type="button" disabled={at === data.searches.length - 1} onClick={() => show("search", at + 1)} aria-label="Next search">
                  ▶
                </button>
              </div>
            ) : null}
            <SearchView data={data} search={data.searches[at]} />
          </>
        ) : null}
        {tab === "evaluation" ? <EvaluationView data={data} open={(search) => show("search", search)} /> : null}
        {tab === "report" ? <ReportView data={data} /> : null}
        {tabs.length ? null : <p class="plain">There is nothing to show.</p>}
        </div>
      </main>
    </>
  );
}

function start() {
  const app = document.getElementById("app")!;
  const data = JSON.parse(document.getElementById("data")!.textContent!) as Data;
  if (data.version !== VERSION) {
    app.textContent = `This page reads data of version ${VERSION}, and got ${data.version}.`;
    return;
  }
  app.replaceChildren();
  render(<App data={data} />, app);
  document.documentElement.dataset.ready = "yes";
}

start();
