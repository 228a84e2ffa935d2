// A chart of Observable Plot that fits its place and follows the theme.
import * as Plot from "@observablehq/plot";
import { useEffect, useRef, useState } from "preact/hooks";
import { type Palette, PALETTES, useTheme } from "./theme";

export { Plot };

export type Drawn = (SVGSVGElement | HTMLElement) & Plot.Plot;

interface Props {
  label: string;
  height: number;
  draw: (width: number, palette: Palette) => Plot.PlotOptions;
  deps: unknown[];
  onDrawn?: (plot: Drawn, width: number) => void;
  least?: number;
}

export function Chart({ label, height, draw, deps, onDrawn, least = 280 }: Props) {
  const place = useRef<HTMLDivElement>(null);
  const [width, setWidth] = useState(0);
  const [theme] = useTheme();
  useEffect(() => {
    const observer = new ResizeObserver(([entry]) => setWidth(Math.round(entry.contentRect.width)));
    observer.observe(place.current!);
    return () => observer.disconnect();
  }, []);
  useEffect(() => {
    if (!width) return;
    const wide = Math.max(width, least);
    const options = draw(wide, PALETTES[theme]);
    const plot = Plot.plot({ ...options, width: wide, height, ariaLabel: label }) as Drawn;
    plot.setAttribute("role", "img");
    place.current!.replaceChildren(plot);
    onDrawn?.(plot, wide);
  }, [width, theme, height, label, ...deps]);
  return <div class="chart" ref={place} style={{ minHeight: `${height}px` }} />;
}

// A mark whose items can be clicked and reached with the tab key.
export function pressable(
  names: (i: number) => string,
  press: (i: number) => void,
): Plot.RenderFunction {
  return (index, scales, values, dimensions, context, next) => {
    const group = next!(index, scales, values, dimensions, context) as SVGElement;
    Array.from(group.children).forEach((child, k) => {
      const i = index[k];
      child.setAttribute("tabindex", "0");
      child.setAttribute("role", "button");
      child.setAttribute("aria-label", names(i));
      child.setAttribute("class", "pressable");
      child.addEventListener("click", () => press(i));
      child.addEventListener("keydown", (event) => {
        const key = (event as KeyboardEvent).key;
        if (key !== "Enter" && key !== " ") return;
        event.preventDefault();
        event.stopPropagation();
        press(i);
      });
    });
    return group as SVGElement;
  };
}
