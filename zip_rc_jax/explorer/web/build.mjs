// Bundles the page into one file: ../../assets/explorer.html. Run by `make explorer`.
import { createHash } from "node:crypto";
import { readFileSync, writeFileSync } from "node:fs";
import { build } from "esbuild";

const here = new URL(".", import.meta.url);
const options = { bundle: true, minify: true, write: false, charset: "utf8", legalComments: "none", lineLimit: 160 };
const target = ["chrome112", "firefox113", "safari16.4"];

async function bundled(entry, extra = {}) {
  const entryPoints = [new URL(entry, here).pathname];
  const built = await build({ ...options, ...extra, entryPoints, target });
  return built.outputFiles[0].text.trim();
}

const script = await bundled("src/main.tsx", {
  format: "iife",
  jsx: "automatic",
  jsxImportSource: "preact",
  define: { "process.env.NODE_ENV": '"production"' },
});
// Nothing in the script may end its element.
const safe = script.replaceAll("</script", "<\\/script").replaceAll("<!--", "<\\!--");
const style = await bundled("src/style.css");
const hash = createHash("sha256").update(safe, "utf8").digest("base64");
const page = readFileSync(new URL("src/index.html", here), "utf8")
  .replace("%STYLE%", () => style)
  .replace("%HASH%", () => hash)
  .replace("%SCRIPT%", () => safe);
const out = process.argv[2] ?? new URL("../../assets/explorer.html", here).pathname;
writeFileSync(out, page);
console.log(`${out}: ${(page.length / 1000).toFixed(0)} kB`);
