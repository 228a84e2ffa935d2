// Light and dark, and the colors of charts: orange is low and blue is high, which color-blind
// readers can tell apart.
import { useEffect, useState } from "preact/hooks";

export type Theme = "light" | "dark";
export type Choice = Theme | "auto";

const dark = matchMedia("(prefers-color-scheme: dark)");
const listeners = new Set<() => void>();
let choice: Choice = "auto";

export function theme(): Theme {
  return choice === "auto" ? (dark.matches ? "dark" : "light") : choice;
}

function apply() {
  document.documentElement.dataset.theme = theme();
  listeners.forEach((listener) => listener());
}

export function choose(next: Choice) {
  choice = next;
  apply();
}

dark.addEventListener("change", apply);
apply();

export function useTheme(): [Theme, Choice] {
  const [, again] = useState(0);
  useEffect(() => {
    const listener = () => again((n) => n + 1);
    listeners.add(listener);
    return () => void listeners.delete(listener);
  }, []);
  return [theme(), choice];
}

export interface Palette {
  low: string;
  middle: string;
  high: string;
  soft: string;
  accent: string;
  heat: string[];
  series: string[];
}

export const PALETTES: Record<Theme, Palette> = {
  light: {
    low: "#c2540a",
    middle: "#9a8f86",
    high: "#0b62b0",
    soft: "#8a8f98",
    accent: "#0b57a4",
    heat: ["#f4f6f8", "#9fc3e0", "#0b4f94"],
    series: ["#0072b2", "#d55e00", "#009e73", "#a4578b", "#7a6a00", "#8c5a2b", "#555b63", "#000000"],
  },
  dark: {
    low: "#ff9a4d",
    middle: "#9b948d",
    high: "#63b3ff",
    soft: "#7d858f",
    accent: "#7cc0ff",
    heat: ["#1b2027", "#2f6a9e", "#a8dcff"],
    series: ["#56b4e9", "#ff8c42", "#3fcf9f", "#e5a0c8", "#e6d34a", "#c9a27a", "#b4bac2", "#ffffff"],
  },
};
