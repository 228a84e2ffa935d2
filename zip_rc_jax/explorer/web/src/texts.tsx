// The text of every prefix, colored token by token. Text of a model is put into text nodes alone.
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { number, type Prefix, type Search, tokensAt, type Track, trackOf } from "./data";

export type Mode = "p" | "remaining" | "none";
export const LEVELS = 10;
const SHORT = 512; // tokens that are always laid out
const BLOCK = 256; // tokens that are laid out together

export function level(x: number): number {
  return Math.max(0, Math.min(LEVELS, Math.round(x * LEVELS)));
}

// Remaining tokens on a scale of logarithms: 0 at the end, 1 at the most.
export function farness(remaining: number, most: number): number {
  return most <= 0 ? 0 : Math.log1p(Math.max(0, remaining)) / Math.log1p(most);
}

// Line breaks and tabs of a token are shown as signs; the break follows.
function visible(piece: string): string {
  return piece === "" ? "\u200b" : piece;
}

function fill(place: HTMLElement, track: Track, most: number) {
  const all = document.createDocumentFragment();
  for (let first = 0; first < track.pieces.length; first += BLOCK) {
    const block = document.createElement("span");
    block.className = "block";
    const end = Math.min(first + BLOCK, track.pieces.length);
    for (let i = first; i < end; i++) {
      const token = document.createElement("span");
      token.textContent = visible(track.pieces[i]);
      const known = Number.isFinite(track.p[i]);
      token.className = known ? `t p${level(track.p[i])} r${level(farness(track.remaining[i], most))}` : "t";
      if (i < track.shared) token.classList.add("shared");
      (token as HTMLElement & { at: number }).at = i;
      block.append(token);
    }
    all.append(block);
  }
  place.replaceChildren(all);
}

interface TextProps {
  search: Search;
  prefix: Prefix;
  most: number;
  until: number; // tokens that were written at the decision that is shown
  cursor: number; // the token under the pointer, -1 for none
  onPoint: (token: number, fixed: boolean) => void;
}

function tokenOf(event: Event): number {
  const at = (event.target as HTMLElement & { at?: number }).at;
  return at === undefined ? -1 : at;
}

function TokenText({ search, prefix, most, until, cursor, onPoint }: TextProps) {
  const place = useRef<HTMLDivElement>(null);
  const track = trackOf(search, prefix);
  const shown = useRef<HTMLElement | null>(null);
  const pieces = track?.pieces.length ?? 0;
  const [near, setNear] = useState(pieces <= SHORT);
  useEffect(() => {
    // A long text far below the window is plain until a reader comes near.
    if (!track) return;
    const observer = new IntersectionObserver(
      (entries) => entries.some((entry) => entry.isIntersecting) && setNear(true),
      { rootMargin: "400px" },
    );
    observer.observe(place.current!);
    return () => observer.disconnect();
  }, [track === null]);
  useEffect(() => {
    if (track && (near || cursor >= 0)) fill(place.current!, track, most);
    else if (track) place.current!.textContent = track.pieces.join("");
    shown.current = null;
  }, [track, pieces, most, near || cursor >= 0]);
  useEffect(() => {
    // Blocks and tokens after the decision are dimmed.
    if (!track || !place.current!.firstElementChild) return;
    let count = 0;
    while (count < track.pieces.length && track.at[count] <= until) count++;
    Array.from(place.current!.children).forEach((block, b) => {
      const first = b * BLOCK;
      const later = first >= count;
      block.classList.toggle("later", later);
      const mixed = !later && first + BLOCK > count && block.children.length > 0;
      if (mixed || block.hasAttribute("data-mixed")) {
        Array.from(block.children).forEach((token, i) => token.classList.toggle("later", mixed && first + i >= count));
        block.toggleAttribute("data-mixed", mixed);
      }
    });
  }, [track, pieces, until, most, near || cursor >= 0]);
  useEffect(() => {
    shown.current?.classList.remove("at");
    const block = cursor < 0 ? null : place.current!.children[Math.floor(cursor / BLOCK)];
    shown.current = (block?.children[cursor % BLOCK] as HTMLElement) ?? null;
    shown.current?.classList.add("at");
  }, [cursor, track, pieces, most, near]);
  if (!track) return <div class="tokens plain">{prefix.text}</div>;
  return (
    <div
      class="tokens"
      ref={place}
      onPointerOver={(event) => tokenOf(event) >= 0 && onPoint(tokenOf(event), false)}
      onClick={(event) => tokenOf(event) >= 0 && onPoint(tokenOf(event), true)}
    />
  );
}

interface Props {
  search: Search;
  decision: number;
  mode: Mode;
  setMode: (mode: Mode) => void;
  selected: number;
  cursor: number;
  onSelect: (prefix: number) => void;
  onPoint: (prefix: number, token: number, fixed: boolean) => void;
}

const STATES: Record<string, string> = { finished: "finished", paused: "left unfinished", failed: "failed", live: "goes on" };

export function Texts({ search, decision, mode, setMode, selected, cursor, onSelect, onPoint }: Props) {
  const begun = search.prefixes.filter((prefix) => prefix.length > 0 || prefix.text);
  const tracks = begun.map((prefix) => trackOf(search, prefix));
  const most = useMemo(
    () =>
      tracks.reduce((top, track) => {
        for (let i = 0; track && i < track.remaining.length; i++) top = Math.max(top, track.remaining[i] || 0);
        return top;
      }, 0),
    [search],
  );
  const colored = tracks.some((track) => track !== null);
  const modes: [Mode, string][] = [
    ["p", "P(correct)"],
    ["remaining", "remaining"],
    ["none", "plain"],
  ];
  return (
    <section class="card" aria-label="Texts of all prefixes">
      <div class="row">
        <h2>Texts</h2>
        <div class="choice" role="group" aria-label="Color of a token">
          {modes.map(([key, name]) => (
            <button type="button" key={key} aria-pressed={mode === key} disabled={!colored} onClick={() => setMode(key)}>
              {name}
            </button>
          ))}
        </div>
        {colored ? <Ramp mode={mode} most={most} /> : null}
      </div>
      {colored ? null : (
        <p class="note">
          What the head says after every token was not recorded. <code>zip-rc decode --introspect</code> records it.
        </p>
      )}
      <ol class={`texts by-${mode}`}>
        {begun.map((prefix) => {
          const until = tokensAt(search, prefix, decision);
          return (
            <li key={prefix.id} class={prefix.id === selected ? "selected" : ""}>
              <button type="button" class="name" aria-pressed={prefix.id === selected} onClick={() => onSelect(prefix.id)}>
                prefix {prefix.id}
              </button>
              <span class="said">
                {prefix.id === search.prefix_id ? <b>answer · </b> : null}
                {STATES[prefix.state] ?? prefix.state} · P(correct) {number(prefix.expected_reward)} · {prefix.length} tokens
                {prefix.parent >= 0 ? ` · forked from ${prefix.parent} after ${prefix.fork_position}` : ""}
              </span>
              <TokenText
                search={search}
                prefix={prefix}
                most={most}
                until={until}
                cursor={prefix.id === selected ? cursor : -1}
                onPoint={(token, fixed) => onPoint(prefix.id, token, fixed)}
              />
            </li>
          );
        })}
      </ol>
    </section>
  );
}

function Ramp({ mode, most }: { mode: Mode; most: number }) {
  if (mode === "none") return null;
  const ends = mode === "p" ? ["0", "1"] : ["0", number(most, 0)];
  return (
    <span class="ramp" aria-hidden="true">
      {ends[0]}
      {Array.from({ length: LEVELS + 1 }, (_, i) => (
        <i key={i} class={mode === "p" ? `ramp-p p${i}` : `ramp-r r${i}`} />
      ))}
      {ends[1]}
    </span>
  );
}
